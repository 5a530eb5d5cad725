"""Writes a trained Llama and its tokenizer as a Q8_0 GGUF, and checks what llama.cpp makes of the file."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from gguf import quants
from tokenizers import Tokenizer

from .model import Llama, Shape
from .tokenizer import ASSISTANT, CHAT_TEMPLATE, END, PRE_TOKENIZER, SPECIAL, SYSTEM, USER


@dataclass(frozen=True)
class Card:
    """What the file says about itself."""

    name: str
    description: str
    version: str = "1"
    license: str = "apache-2.0"
    author: str = "FlexServe"


def write(path: Path, shape: Shape, weights: Mapping[str, torch.Tensor], bpe: Tokenizer, card: Card) -> None:
    """Matrices as Q8_0, norms as F32, the embedding tied to the output. No half file under the final name."""
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_name(card.name)
    writer.add_description(card.description)
    writer.add_version(card.version)
    writer.add_license(card.license)
    writer.add_author(card.author)
    writer.add_size_label(f"{sum(w.numel() for w in weights.values()) / 1e6:.1f}M")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocab)
    _write_vocabulary(writer, bpe)
    for name, tensor in weights.items():
        values = tensor.detach().float().numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)


def _write_vocabulary(writer: gguf.GGUFWriter, bpe: Tokenizer) -> None:
    tokens = [bpe.id_to_token(i) for i in range(bpe.get_vocab_size())]
    state = json.loads(bpe.to_str())
    # Tokens that no merge yields are found in the text as they stand: the marks only where a template writes them.
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    for token in state["added_tokens"]:
        kinds[token["id"]] = (
            gguf.TokenType.CONTROL if token["content"] in SPECIAL else gguf.TokenType.USER_DEFINED
        )
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    end = tokens.index(END)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    # llama.cpp takes token 11 for a missing "beginning"; this model has none and never adds one.
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def check_tokens(path: Path, bpe: Tokenizer, lines: Sequence[str]) -> None:
    """Raises ValueError naming the first line that llama.cpp cuts otherwise than our tokenizer."""
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for line in lines:
        ours = bpe.encode(line, add_special_tokens=False).ids
        theirs = llama.tokenize(line.encode(), add_bos=False, special=False)
        if ours != theirs:
            raise ValueError(f"{line!r} is {ours} here and {theirs} in llama.cpp")
    marks = [SYSTEM, USER, ASSISTANT, END]
    theirs = llama.tokenize("".join(marks).encode(), add_bos=False, special=True)
    if theirs != [bpe.token_to_id(mark) for mark in marks]:
        raise ValueError(f"the special tokens are {theirs} in llama.cpp")
    llama.close()


def check_logits(path: Path, model: Llama, prompts: Sequence[Sequence[int]]) -> float:
    """The largest difference between PyTorch's and llama.cpp's probabilities of what comes after a prompt.

    Raises ValueError above 0.1: Q8_0 moves them by far less, a wrong rotation or matrix by far more.
    """
    llama = llama_cpp.Llama(str(path), n_ctx=512, n_threads=2, verbose=False)
    worst = 0.0
    model.eval()
    for ids in prompts:
        llama.reset()
        llama.eval(list(ids))
        pointer = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        theirs = np.ctypeslib.as_array(
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (model.shape.vocab,)
        )
        with torch.no_grad():
            ours = model.logits(model(torch.tensor([list(ids)]))[0, -1]).softmax(-1)
        difference = (ours - torch.tensor(theirs.copy()).softmax(-1)).abs().max().item()
        worst = max(worst, difference)
    llama.close()
    if worst > 0.1:
        raise ValueError(f"llama.cpp's probabilities differ from PyTorch's by {worst:.3f}")
    return worst
