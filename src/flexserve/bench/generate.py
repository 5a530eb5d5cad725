"""Writes models in the true shapes with random weights and a small made-up tokenizer, for measuring.

What they answer is noise; how long it takes is not. Everything follows from (shape, quantisation, seed).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np

from ..errors import StorageFailure, Usage
from ..sealed.ggml_types import FILE_TYPES, TENSOR_TYPES, TensorType
from .random_blocks import random_blocks
from .shapes import ModelShape

QUANTIZATIONS = ("F16", "Q8_0", "Q4_0", "Q4_K_M", "IQ4_NL")
ALIGNMENT = 32
_FOUR_BITS = ("Q4_0", "Q4_K", "IQ4_NL")
_CHUNK_BYTES = 8 << 20
_TYPES = {kind.name: kind for kind in TENSOR_TYPES.values()}

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] "
    "+ '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_SPECIAL = {
    "llama": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    "qwen3": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
}
_MERGES = ("t h", "i n", "e r", "th e", "Ġ a", "Ġ the", "in g", "o n")


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]  # row length first
    kind: TensorType

    @property
    def nbytes(self) -> int:
        rows = self.shape[1] if len(self.shape) > 1 else 1
        return self.shape[0] // self.kind.block * self.kind.block_bytes * rows


def model_bytes(shape: ModelShape, quant: str) -> int:
    """Bytes of the weights. Raises `Usage`."""
    _check_quant(quant)
    return sum(t.nbytes for t in _tensors(shape, quant))


def _check_quant(quant: str) -> None:
    if quant not in QUANTIZATIONS:
        raise Usage(f"no quantisation is called {quant!r}", hint=f"there are {', '.join(QUANTIZATIONS)}")


def write_model(
    shape: ModelShape,
    quant: str,
    path: Path,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a GGUF file; returns its size in bytes.

    `progress(done, total)` is called with bytes of weights. Memory stays below 100 MB whatever the shape.
    The file appears under its name when it is complete. Raises `Usage`, `StorageFailure`.
    """
    _check_quant(quant)
    tensors = _tensors(shape, quant)
    total = sum(t.nbytes for t in tensors)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            _write_header(shape, quant, part, tensors)
            with part.open("ab") as file:
                _pad(file)
                done = 0
                for index, tensor in enumerate(tensors):
                    for chunk in _contents(tensor, np.random.Generator(np.random.SFC64([seed, index]))):
                        file.write(chunk)
                        done += len(chunk)
                        if progress is not None:
                            progress(done, total)
                    _pad(file)
                size = file.tell()
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise StorageFailure(f"cannot write {path}: {error.strerror}") from error
    return size


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _contents(tensor: _Tensor, rng: np.random.Generator) -> Iterator[bytes]:
    if tensor.kind.name == "F32":
        yield rng.normal(1.0, 0.05, tensor.shape[0]).astype(np.float32).tobytes()
        return
    left = tensor.nbytes // tensor.kind.block_bytes
    step = _CHUNK_BYTES // tensor.kind.block_bytes
    while left:
        count = min(step, left)
        yield random_blocks(tensor.kind.name, count, rng).tobytes()
        left -= count


def _tensors(shape: ModelShape, quant: str) -> list[_Tensor]:
    width, hidden, head = shape.embedding_length, shape.feed_forward_length, shape.key_length
    base = _TYPES["Q4_K" if quant == "Q4_K_M" else quant]
    # llama-quantize keeps the output matrix finer than 4 bits; a tied embedding is the output matrix
    output = _TYPES["Q6_K"] if base.name in _FOUR_BITS else base
    f32 = _TYPES["F32"]
    tensors = [_Tensor("token_embd.weight", (width, shape.vocabulary), output if shape.tied_output else base)]
    for layer in range(shape.layers):
        finer = _TYPES["Q6_K"] if quant == "Q4_K_M" and _more_bits(layer, shape.layers) else base
        block = f"blk.{layer}."
        tensors.append(_Tensor(block + "attn_norm.weight", (width,), f32))
        tensors.append(_Tensor(block + "attn_q.weight", (width, shape.heads * head), base))
        tensors.append(_Tensor(block + "attn_k.weight", (width, shape.kv_heads * head), base))
        tensors.append(_Tensor(block + "attn_v.weight", (width, shape.kv_heads * head), finer))
        if shape.architecture == "qwen3":
            tensors.append(_Tensor(block + "attn_q_norm.weight", (head,), f32))
            tensors.append(_Tensor(block + "attn_k_norm.weight", (head,), f32))
        tensors.append(_Tensor(block + "attn_output.weight", (shape.heads * head, width), base))
        tensors.append(_Tensor(block + "ffn_norm.weight", (width,), f32))
        tensors.append(_Tensor(block + "ffn_gate.weight", (width, hidden), base))
        tensors.append(_Tensor(block + "ffn_up.weight", (width, hidden), base))
        tensors.append(_Tensor(block + "ffn_down.weight", (hidden, width), finer))
    tensors.append(_Tensor("output_norm.weight", (width,), f32))
    if not shape.tied_output:
        tensors.append(_Tensor("output.weight", (width, shape.vocabulary), output))
    return tensors


def _more_bits(layer: int, layers: int) -> bool:
    """Which layers get Q6_K in a Q4_K_M file (llama.cpp's use_more_bits)."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _write_header(shape: ModelShape, quant: str, path: Path, tensors: list[_Tensor]) -> None:
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_name(f"{shape.name} with random weights")
    writer.add_file_type(next(number for number, name in FILE_TYPES.items() if name == quant))
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context_tokens)
    writer.add_embedding_length(shape.embedding_length)
    writer.add_feed_forward_length(shape.feed_forward_length)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.key_length)
    writer.add_value_length(shape.key_length)
    writer.add_rope_dimension_count(shape.key_length)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_vocab_size(shape.vocabulary)
    _add_tokenizer(writer, shape)
    for tensor in tensors:
        row = tensor.shape[0] // tensor.kind.block * tensor.kind.block_bytes
        rows = tensor.shape[1:][::-1]
        kind = gguf.GGMLQuantizationType(tensor.kind.id)
        if tensor.kind.block == 1:
            dtype = np.dtype(np.float32 if tensor.kind.name == "F32" else np.float16)
            writer.add_tensor_info(tensor.name, (*rows, tensor.shape[0]), dtype, tensor.nbytes, kind)
        else:
            writer.add_tensor_info(tensor.name, (*rows, row), np.dtype(np.uint8), tensor.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, shape: ModelShape) -> None:
    """A byte-level BPE vocabulary of the full size: the 256 bytes, the results of a few merges, made-up words
    that no merge leads to, and the architecture's special tokens at the end."""
    special = _SPECIAL[shape.architecture]
    tokens = [*_byte_alphabet(), *(merge.replace(" ", "") for merge in _MERGES)]
    words = shape.vocabulary - len(tokens) - len(special)
    tokens += (f"Ġ{_word(number)}" for number in range(words))
    tokens += special
    ids = {token: len(tokens) - len(special) + i for i, token in enumerate(special)}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe" if shape.architecture == "llama" else "qwen2")
    writer.add_token_list(tokens)
    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    writer.add_token_types([normal] * (len(tokens) - len(special)) + [control] * len(special))
    writer.add_token_merges(list(_MERGES))
    if shape.architecture == "llama":
        writer.add_bos_token_id(ids["<|begin_of_text|>"])
        writer.add_eos_token_id(ids["<|eot_id|>"])
        writer.add_chat_template(_LLAMA3)
    else:
        writer.add_bos_token_id(ids["<|endoftext|>"])
        writer.add_eos_token_id(ids["<|im_end|>"])
        writer.add_add_bos_token(False)
        writer.add_chat_template(_CHATML)


def _byte_alphabet() -> list[str]:
    """GPT-2's letters for the bytes 0 to 255: printable bytes stand for themselves."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _word(number: int) -> str:
    """A distinct word of at least four letters, consonant and vowel in turn."""
    consonants, vowels = "bcdfghjklmnprstvwz", "aeiou"
    letters: list[str] = []
    while number or len(letters) < 4:
        alphabet = vowels if len(letters) % 2 else consonants
        number, rest = divmod(number, len(alphabet))
        letters.append(alphabet[rest])
    return "".join(letters)
