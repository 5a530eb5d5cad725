"""Models in the true structure of known architectures, as small as they come, with random weights of any type.

Each `Case` is a published model's structure: its tensors, its keys, its tokenizer's kind. `build` makes a GGUF of
it in about 20 milliseconds: quantised weights are random valid blocks (bench/random_blocks.py), everything else is
F32. With `narrow` the same structure is narrower than K-quants allow: what the hostile tests mutate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flexserve.bench.random_blocks import random_blocks
from flexserve.sealed.ggml_types import TENSOR_TYPES

from .sealed.gguf_bytes import ARRAY, BOOL, F32, I32, STRING, U32, File, Key, Weight, nbytes, strings

QUANTS = ("F16", "Q8_0", "Q4_0", "Q4_K_M", "IQ4_NL")
VOCABULARY = 300
_NUMBERS = {kind.name: kind for kind in TENSOR_TYPES.values()}


@dataclass(frozen=True)
class Size:
    """Elements of each kind; `layers` is how many blocks."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    experts: int = 4
    expert_hidden: int = 256
    context: int = 2048


WIDE = Size(2, 256, 512, 4, 2, 64)
NARROW = Size(2, 64, 96, 4, 2, 16, expert_hidden=32, context=512)


class _Model:
    """Collects keys and tensors of one file."""

    def __init__(self, arch: str, size: Size) -> None:
        self.arch, self.size = arch, size
        self.keys: list[Key] = [Key("general.architecture", STRING, arch)]
        self.weights: list[Weight] = []

    def key(self, name: str, value: bool | float | str | list[int]) -> None:
        """A key of the architecture; the type follows from the value."""
        full = f"{self.arch}.{name}"
        if isinstance(value, list):
            self.keys.append(Key(full, ARRAY, value, I32))
            return
        kinds: dict[type, int] = {bool: BOOL, int: U32, float: F32, str: STRING}
        self.keys.append(Key(full, kinds[type(value)], value))

    def add(self, name: str, *shape: int) -> None:
        self.weights.append(Weight(name, shape))

    def block(self, layer: int, **tensors: tuple[int, ...]) -> None:
        """Tensors of a layer: `attn_q=(in, out)`; a trailing `_bias` names a bias."""
        for name, shape in tensors.items():
            full = f"{name[:-5]}.bias" if name.endswith("_bias") else f"{name}.weight"
            self.add(f"blk.{layer}.{full}", *shape)

    def general(self, *, rope: bool = True, rms: bool = True) -> None:
        s = self.size
        self.key("block_count", s.layers)
        self.key("context_length", s.context)
        self.key("embedding_length", s.width)
        self.key("feed_forward_length", s.hidden)
        self.key("attention.head_count", s.heads)
        self.key("attention.head_count_kv", s.kv_heads)
        if rope:
            self.key("rope.dimension_count", s.head)
            self.key("rope.freq_base", 10000.0)
        self.key(f"attention.layer_norm_{'rms_' * rms}epsilon", 1e-5)

    def bpe(self, pre: str = "default") -> None:
        tokens = [chr(256 + i) for i in range(VOCABULARY)]
        self.keys += [
            Key("tokenizer.ggml.model", STRING, "gpt2"),
            Key("tokenizer.ggml.pre", STRING, pre),
            strings("tokenizer.ggml.tokens", tokens),
            Key("tokenizer.ggml.token_type", ARRAY, [1] * VOCABULARY, I32),
            strings("tokenizer.ggml.merges", [f"{tokens[0]} {tokens[1]}"]),
            Key("tokenizer.ggml.bos_token_id", U32, 1),
            Key("tokenizer.ggml.eos_token_id", U32, 2),
        ]

    def sentencepiece(self) -> None:
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
        words = VOCABULARY - len(tokens)
        tokens += [f"▁{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(words)]
        self.keys += [
            Key("tokenizer.ggml.model", STRING, "llama"),
            Key("tokenizer.ggml.pre", STRING, "default"),
            strings("tokenizer.ggml.tokens", tokens),
            Key("tokenizer.ggml.scores", ARRAY, [float(-i) for i in range(VOCABULARY)], F32),
            Key("tokenizer.ggml.token_type", ARRAY, [2, 3, 3] + [6] * 256 + [1] * words, I32),
            Key("tokenizer.ggml.bos_token_id", U32, 1),
            Key("tokenizer.ggml.eos_token_id", U32, 2),
            Key("tokenizer.ggml.unknown_token_id", U32, 0),
        ]

    def wordpiece(self) -> None:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        letters = [chr(97 + i) for i in range(26)]
        tokens = [*special, *(f"▁{c}" for c in letters), *letters]  # with the mark: at the start of a word
        tokens += [f"▁{a}{b}" for a in letters for b in letters][: VOCABULARY - len(tokens)]
        self.keys += [
            Key("tokenizer.ggml.model", STRING, "bert"),
            Key("tokenizer.ggml.pre", STRING, "default"),
            strings("tokenizer.ggml.tokens", tokens),
            Key("tokenizer.ggml.token_type", ARRAY, [3] * 5 + [1] * (VOCABULARY - 5), I32),
            Key("tokenizer.ggml.token_type_count", U32, 2),
            Key("tokenizer.ggml.padding_token_id", U32, 0),
            Key("tokenizer.ggml.unknown_token_id", U32, 1),
            Key("tokenizer.ggml.bos_token_id", U32, 2),
            Key("tokenizer.ggml.seperator_token_id", U32, 3),
            Key("tokenizer.ggml.mask_token_id", U32, 4),
        ]

    def attention(self, layer: int, *, bias: bool = False, norms: bool = False, fused: bool = False) -> None:
        s = self.size
        q, kv = s.heads * s.head, s.kv_heads * s.head
        if fused:
            self.block(layer, attn_qkv=(s.width, q + 2 * kv))
        else:
            self.block(layer, attn_q=(s.width, q), attn_k=(s.width, kv), attn_v=(s.width, kv))
        if bias:
            self.block(layer, attn_q_bias=(q,), attn_k_bias=(kv,), attn_v_bias=(kv,))
        if norms:
            self.block(layer, attn_q_norm=(s.head,), attn_k_norm=(s.head,))
        self.block(layer, attn_output=(q, s.width))

    def dense(self, layer: int) -> None:
        s = self.size
        self.block(
            layer, ffn_gate=(s.width, s.hidden), ffn_up=(s.width, s.hidden), ffn_down=(s.hidden, s.width)
        )

    def experts(self, layer: int) -> None:
        w, h, n = self.size.width, self.size.expert_hidden, self.size.experts
        self.block(layer, ffn_gate_inp=(w, n))
        self.block(layer, ffn_gate_exps=(w, h, n), ffn_up_exps=(w, h, n), ffn_down_exps=(h, w, n))

    def ends(self, *, tied: bool) -> None:
        self.add("token_embd.weight", self.size.width, VOCABULARY)
        self.add("output_norm.weight", self.size.width)
        if not tied:
            self.add("output.weight", self.size.width, VOCABULARY)

    def file(self) -> File:
        return File(tuple(self.keys), tuple(self.weights))


def _decoder(
    size: Size, arch: str, *, tied: bool, bias: bool = False, norms: bool = False, post: bool = False
) -> _Model:
    """A dense decoder: what most architectures vary a little."""
    model = _Model(arch, size)
    model.general()
    model.ends(tied=tied)
    for layer in range(size.layers):
        model.block(layer, attn_norm=(size.width,), ffn_norm=(size.width,))
        model.attention(layer, bias=bias, norms=norms)
        model.dense(layer)
        if post:
            model.block(layer, post_attention_norm=(size.width,), post_ffw_norm=(size.width,))
    return model


def _llama3(size: Size) -> File:
    model = _decoder(size, "llama", tied=False)
    model.add("rope_freqs.weight", size.head // 2)
    model.bpe("llama-bpe")
    return model.file()


def _smollm(size: Size) -> File:
    model = _decoder(size, "llama", tied=True)
    model.bpe("smollm")
    return model.file()


def _mistral(size: Size) -> File:
    model = _decoder(size, "llama", tied=False)
    model.sentencepiece()
    return model.file()


def _qwen25(size: Size) -> File:
    model = _decoder(size, "qwen2", tied=True, bias=True)
    model.bpe("qwen2")
    return model.file()


def _qwen3(size: Size) -> File:
    model = _decoder(size, "qwen3", tied=True, norms=True)
    model.bpe("qwen2")
    return model.file()


def _qwen3_moe(size: Size) -> File:
    model = _Model("qwen3moe", size)
    model.general()
    model.key("attention.key_length", size.head)
    model.key("attention.value_length", size.head)
    model.key("expert_count", size.experts)
    model.key("expert_used_count", 2)
    model.key("expert_feed_forward_length", size.expert_hidden)
    model.ends(tied=False)
    for layer in range(size.layers):
        model.block(layer, attn_norm=(size.width,), ffn_norm=(size.width,))
        model.attention(layer, norms=True)
        model.experts(layer)
    model.bpe("qwen2")
    return model.file()


def _gemma3(size: Size) -> File:
    model = _decoder(size, "gemma3", tied=True, norms=True, post=True)
    model.key("attention.sliding_window", 8)  # shorter than the tests' prompts
    model.key("attention.sliding_window_pattern", 2)
    model.key("rope.freq_base_swa", 1000.0)
    model.sentencepiece()
    return model.file()


def _phi4(size: Size) -> File:
    size = replace(size, kv_heads=size.heads)
    model = _Model("phi3", size)
    model.general()
    model.key("rope.scaling.original_context_length", size.context)
    model.key("rope.scaling.attn_factor", 1.1)
    model.ends(tied=False)
    model.add("rope_factors_long.weight", size.head // 2)
    model.add("rope_factors_short.weight", size.head // 2)
    for layer in range(size.layers):
        model.block(layer, attn_norm=(size.width,), ffn_norm=(size.width,))
        model.attention(layer, fused=True)
        model.block(layer, ffn_up=(size.width, 2 * size.hidden), ffn_down=(size.hidden, size.width))
    model.bpe("gpt-4o")
    return model.file()


def _deepseek2_lite(size: Size) -> File:
    """27 blocks: llama.cpp knows the lite structure (no low-rank queries) by their number."""
    rope, nope, value, rank = 16, 32, 32, 64
    size = replace(size, layers=27, heads=2, kv_heads=1, expert_hidden=32, head=rank + rope)
    model = _Model("deepseek2", size)
    model.general(rope=False)
    for name, number in (
        ("rope.dimension_count", rope),
        ("attention.key_length", rank + rope),
        ("attention.value_length", rank),
        ("attention.key_length_mla", nope + rope),
        ("attention.value_length_mla", value),
        ("attention.kv_lora_rank", rank),
        ("leading_dense_block_count", 1),
        ("expert_count", size.experts),
        ("expert_used_count", 2),
        ("expert_shared_count", 1),
        ("expert_feed_forward_length", size.expert_hidden),
        ("expert_gating_func", 1),
    ):
        model.key(name, number)
    model.ends(tied=False)
    w, heads, h = size.width, size.heads, size.expert_hidden
    for layer in range(size.layers):
        model.block(layer, attn_norm=(w,), attn_q=(w, heads * (nope + rope)), attn_kv_a_mqa=(w, rank + rope))
        model.block(
            layer, attn_kv_a_norm=(rank,), attn_k_b=(nope, rank, heads), attn_v_b=(rank, value, heads)
        )
        model.block(layer, attn_output=(heads * value, w), ffn_norm=(w,))
        if layer == 0:
            model.dense(layer)
            continue
        model.experts(layer)
        model.block(layer, ffn_gate_shexp=(w, h), ffn_up_shexp=(w, h), ffn_down_shexp=(h, w))
    model.bpe("deepseek-llm")
    return model.file()


def _recurrent(size: Size, arch: str, inner: int, state: int, rank: int) -> _Model:
    model = _Model(arch, replace(size, heads=0, kv_heads=0, hidden=0))
    model.general(rope=False)
    for name, number in (
        ("conv_kernel", 4),
        ("inner_size", inner),
        ("state_size", state),
        ("time_step_rank", rank),
    ):
        model.key(f"ssm.{name}", number)
    model.ends(tied=True)
    model.bpe("olmo")
    return model


def _mamba(size: Size) -> File:
    w, inner, state, rank = size.width, 2 * size.width, 16, 16
    model = _recurrent(size, "mamba", inner, state, rank)
    for layer in range(size.layers):
        model.block(layer, attn_norm=(w,), ssm_in=(w, 2 * inner), ssm_conv1d=(4, inner))
        model.block(layer, ssm_conv1d_bias=(inner,), ssm_x=(inner, rank + 2 * state), ssm_dt=(rank, inner))
        model.block(layer, ssm_dt_bias=(inner,), ssm_out=(inner, w))
        model.add(f"blk.{layer}.ssm_a", state, inner)
        model.add(f"blk.{layer}.ssm_d", inner)
    return model.file()


def _mamba2(size: Size) -> File:
    w, inner, state, rank, groups = size.width, 2 * size.width, 16, 8, 2
    conv = inner + 2 * groups * state
    model = _recurrent(size, "mamba2", inner, state, rank)
    model.key("ssm.group_count", groups)
    for layer in range(size.layers):
        model.block(layer, attn_norm=(w,), ssm_in=(w, inner + conv + rank), ssm_conv1d=(4, conv))
        model.block(layer, ssm_conv1d_bias=(conv,), ssm_dt_bias=(rank,), ssm_out=(inner, w))
        model.block(layer, ssm_norm=(inner // groups, groups))
        model.add(f"blk.{layer}.ssm_a", 1, rank)
        model.add(f"blk.{layer}.ssm_d", 1, rank)
    return model.file()


def _encoder(size: Size, arch: str, pooling: int) -> _Model:
    size = replace(size, kv_heads=size.heads, context=512)
    model = _Model(arch, size)
    model.general(rope=arch != "bert", rms=False)
    model.key("attention.causal", False)
    model.key("pooling_type", pooling)
    w = size.width
    model.add("token_embd.weight", w, VOCABULARY)
    model.add("token_types.weight", w, 2)
    for part in ("weight", "bias"):
        model.add(f"token_embd_norm.{part}", w)
    for layer in range(size.layers):
        model.attention(layer, bias=arch == "bert", fused=arch != "bert")
        model.block(layer, attn_output_norm=(w,), attn_output_norm_bias=(w,))
        model.block(layer, layer_output_norm=(w,), layer_output_norm_bias=(w,))
    model.wordpiece()
    return model


def _bert(size: Size) -> File:
    model = _encoder(size, "bert", pooling=2)  # CLS, as BGE
    w, h = model.size.width, model.size.hidden
    model.add("position_embd.weight", w, model.size.context)
    for layer in range(size.layers):
        model.block(layer, attn_output_bias=(w,), ffn_up=(w, h), ffn_up_bias=(h,))
        model.block(layer, ffn_down=(h, w), ffn_down_bias=(w,))
    return model.file()


def _nomic_bert(size: Size) -> File:
    model = _encoder(size, "nomic-bert", pooling=1)  # mean
    for layer in range(size.layers):
        model.dense(layer)
    return model.file()


@dataclass(frozen=True)
class Case:
    """A published model's structure. `make` takes its size and gives the file without data, all in F32."""

    name: str
    arch: str
    make: Callable[[Size], File]


GENERATORS = (
    Case("Llama 3", "llama", _llama3),
    Case("Mistral", "llama", _mistral),
    Case("SmolLM", "llama", _smollm),
    Case("Qwen2.5", "qwen2", _qwen25),
    Case("Qwen3", "qwen3", _qwen3),
    Case("Qwen3-MoE", "qwen3moe", _qwen3_moe),
    Case("Gemma 3", "gemma3", _gemma3),
    Case("Phi-4", "phi3", _phi4),
    Case("DeepSeek-V2-Lite", "deepseek2", _deepseek2_lite),
    Case("Mamba", "mamba", _mamba),
    Case("Mamba-2", "mamba2", _mamba2),
)
ENCODERS = (
    Case("BERT", "bert", _bert),
    Case("Nomic-BERT", "nomic-bert", _nomic_bert),
)
CASES = {case.name: case for case in (*GENERATORS, *ENCODERS)}


def case_of(arch: str) -> Case:
    """The first case of that architecture."""
    return next(case for case in CASES.values() if case.arch == arch)


def build(case: Case, quant: str, path: Path, seed: int = 0, size: Size = WIDE) -> Path:
    """Write the model with random weights of that quantisation."""
    path.write_bytes(with_weights(case.make(size), quant, seed).to_bytes())
    return path


def with_weights(file: File, quant: str, seed: int) -> File:
    """The file with types of that quantisation, and random data."""
    weights = [replace(w, type=_type_of(w, quant)) for w in file.weights]
    data = bytearray()
    for index, weight in enumerate(weights):
        data += _content(weight, np.random.Generator(np.random.SFC64([seed, index])))
        data += bytes(-len(data) % file.alignment)
    return replace(file, weights=tuple(weights), data=bytes(data))


_ALWAYS_F32 = (
    "norm",
    "rope_f",
    "ssm_conv1d",
    "ssm_a",
    "ssm_d.",
    "ffn_gate_inp",
    "token_types",
    "position_embd",
)


def _type_of(weight: Weight, quant: str) -> int:
    """As llama-quantize chooses: matrices only, finer where it matters, coarser blocks where rows are short."""
    name = str(weight.name)
    if len(weight.shape) == 1 or any(part in f"{name}." for part in _ALWAYS_F32):
        return 0
    wanted = quant
    if quant == "Q4_K_M":
        finer = "attn_v" in name or "ffn_down" in name or name in ("output.weight", "token_embd.weight")
        wanted = "Q6_K" if finer else "Q4_K"
    elif quant in ("Q4_0", "IQ4_NL") and name == "output.weight":
        wanted = "Q6_K"
    for choice in (wanted, "Q8_0", "F16") if quant != "F32" else ("F32",):
        if weight.shape[0] % _NUMBERS[choice].block == 0:
            return _NUMBERS[choice].id
    raise AssertionError


def _content(weight: Weight, rng: np.random.Generator) -> bytes:
    kind = TENSOR_TYPES[weight.type]
    if kind.name != "F32":
        return random_blocks(kind.name, nbytes(weight) // kind.block_bytes, rng).tobytes()
    name, count = str(weight.name), nbytes(weight) // 4
    if ("norm" in name and name.endswith("weight")) or "rope_f" in name or name.endswith("ssm_d"):
        values = rng.normal(1.0, 0.05, count)
    elif name.endswith("ssm_a"):
        values = -rng.uniform(0.1, 4.0, count)  # a decay
    else:
        values = rng.normal(0.0, 0.3 if "ssm_conv1d" in name else 0.05, count)
    return values.astype(np.float32).tobytes()
