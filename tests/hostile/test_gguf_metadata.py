"""Attack: a well-formed, authentic file with numbers on which llama.cpp aborts, divides by zero or allocates
without bound."""

from __future__ import annotations

import math
from typing import Any

import pytest

from flexserve.errors import ModelMalformed, ModelUnsupported
from flexserve.sealed.gguf import check_model, parse_header

from ..sealed.gguf_bytes import ARRAY, BOOL, F32, I32, STRING, U16, U32, File, Weight, tiny_model


def _check(file: File) -> None:
    data = file.to_bytes()
    check_model(parse_header(data, len(data)))


def _refused(file: File, match: str, error: type[Exception] = ModelMalformed) -> None:
    with pytest.raises(error, match=match):
        _check(file)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo2"])
def test_the_tiny_model_itself_passes(arch: str) -> None:
    _check(tiny_model(arch))
    _check(tiny_model(arch, layers=3, tied=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_count", 0),
        ("block_count", 513),
        ("context_length", 0),
        ("context_length", 1 << 30),
        ("embedding_length", 0),
        ("embedding_length", (1 << 32) - 1),
        ("feed_forward_length", 0),
        ("attention.head_count", 0),
        ("attention.head_count", 1 << 20),
        ("attention.head_count_kv", 0),
        ("attention.key_length", 0),
        ("attention.value_length", 0),
        ("rope.dimension_count", 0),
        ("rope.dimension_count", 15),
        ("rope.dimension_count", 18),
        ("attention.sliding_window", (1 << 32) - 1),
        ("rope.scaling.original_context_length", 0),
        ("expert_count", 1025),
        ("expert_used_count", 1),
        ("nextn_predict_layers", 1),
    ],
)
def test_numbers_out_of_range(name: str, value: int) -> None:
    _refused(tiny_model().with_key(f"llama.{name}", U32, value), f"llama.{name}")


@pytest.mark.parametrize(
    "name",
    ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"],
)
def test_numbers_that_are_missing_or_of_another_kind(name: str) -> None:
    _refused(tiny_model().without_key(f"llama.{name}"), f"llama.{name}")
    _refused(tiny_model().with_key(f"llama.{name}", STRING, "x"), f"llama.{name}")
    _refused(tiny_model().with_key(f"llama.{name}", BOOL, 1), f"llama.{name}")
    _refused(tiny_model().with_key(f"llama.{name}", F32, 2.0), f"llama.{name}")


def test_heads_that_cannot_share() -> None:
    _refused(tiny_model().with_key("llama.attention.head_count_kv", U32, 3), "cannot share 3 key-value heads")


def test_heads_of_different_lengths() -> None:
    file = tiny_model().with_key("llama.attention.value_length", U32, 8)
    _refused(file, "key length 16 and value length 8", ModelUnsupported)
    longer = tiny_model("qwen2")
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        longer = longer.with_key(f"qwen2.{name}", U32, 32)
    _refused(longer, "4 heads of 32 do not make up an embedding of 64")


@pytest.mark.parametrize("values", [[4], [4, 4, 4], [4, 2], [4, 0], [4, -4]])
def test_arrays_for_layers(values: list[int]) -> None:
    file = tiny_model(layers=2).with_key("llama.attention.head_count_kv", ARRAY, values, I32)
    with pytest.raises((ModelMalformed, ModelUnsupported), match="head_count_kv"):
        _check(file)


@pytest.mark.parametrize(
    "name",
    """general.type general.file_type general.name split.count llama.attention.causal llama.pooling_type
    llama.rope.scaling.type llama.block_count llama.embedding_length llama.rope.freq_base llama.expert_count
    llama.context_length tokenizer.chat_template tokenizer.ggml.model tokenizer.ggml.bos_token_id
    tokenizer.ggml.add_bos_token""".split(),  # noqa: SIM905
)
def test_an_array_where_one_value_belongs(name: str) -> None:
    file = tiny_model().with_key(name, ARRAY, [1, 2], U32)
    if name in ("general.file_type", "general.name"):
        _check(file)
    else:
        _refused(file, name)


@pytest.mark.parametrize(
    ("value", "kind", "ok"),
    [
        (0, U32, 0),
        (1, U32, 0),
        (2, U32, 1),
        ([0, 0], BOOL, 0),
        ([1, 0], BOOL, 1),
        ([1], U32, 0),
        ([1.0, 1.0], F32, 0),
    ],
)
def test_sliding_windows_slide_in_some_layer(value: Any, kind: int, ok: int) -> None:
    name = "gemma3.attention.sliding_window_pattern"
    element = kind if isinstance(value, list) else None
    file = tiny_model("gemma3", layers=2).with_key(
        name, ARRAY if element is not None else kind, value, element
    )
    if ok:
        _check(file)
    else:
        _refused(file, "sliding_window_pattern")


def test_an_array_of_equal_numbers_passes() -> None:
    _check(tiny_model(layers=2).with_key("llama.attention.head_count_kv", ARRAY, [2, 2], I32))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-5, 2.0])
def test_epsilons(value: float) -> None:
    _refused(tiny_model().with_key("llama.attention.layer_norm_rms_epsilon", F32, value), "epsilon")


@pytest.mark.parametrize("name", ["rope.freq_base", "rope.scaling.factor", "attention.scale", "x.y"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_number_is_infinite(name: str, value: float) -> None:
    _refused(tiny_model().with_key(f"llama.{name}", F32, value), "finite")


def test_rope_scaling_is_of_a_known_kind() -> None:
    _refused(tiny_model().with_key("llama.rope.scaling.type", STRING, "twisted"), "twisted")
    _refused(tiny_model().with_key("llama.rope.freq_base", F32, 0.0), "freq_base")


@pytest.mark.parametrize(
    ("experts", "used", "groups"), [(8, 0, 0), (8, 9, 0), (8, 2, 8), (8, 2, 3), (0, 0, 1), (8, 2, 2)]
)
def test_experts(experts: int, used: int, groups: int) -> None:
    file = tiny_model("qwen3moe")
    for name, value in (("count", experts), ("used_count", used), ("group_count", groups)):
        file = file.with_key(f"qwen3moe.expert_{name}", U32, value)
    _refused(file, "expert")


@pytest.mark.parametrize(
    ("arch", "known"), [("clip", False), ("t5", False), ("", False), ("../x", False), ("gpt-oss", True)]
)
def test_architectures(arch: str, known: bool) -> None:
    if known:
        _check(tiny_model(arch))
    else:
        _refused(tiny_model(arch), "architecture .* cannot be served: ", ModelUnsupported)


def test_what_is_no_whole_generative_model_is_unsupported() -> None:
    _refused(tiny_model().with_key("split.count", U16, 3), "one of 3 parts", ModelUnsupported)
    _refused(tiny_model().with_key("general.type", STRING, "adapter"), "adapter", ModelUnsupported)
    _refused(tiny_model().with_key("llama.attention.causal", BOOL, 0), "causal", ModelUnsupported)
    _refused(tiny_model().with_key("llama.pooling_type", U32, 4), "rank texts", ModelUnsupported)
    _refused(tiny_model().with_key("llama.pooling_type", U32, 5), "pooling_type")
    _check(tiny_model().with_key("llama.pooling_type", U32, 3))
    _check(tiny_model().with_key("split.count", U16, 1))


def test_chat_templates_are_strings_of_limited_length() -> None:
    _refused(tiny_model().with_key("tokenizer.chat_template", U32, 1), "must be a string")
    _check(tiny_model().with_key("tokenizer.chat_template", STRING, "x" * (256 << 10)))
    _refused(tiny_model().with_key("tokenizer.chat_template", STRING, "x" * ((256 << 10) + 1)), "longer than")


def test_the_embedding_has_a_row_for_each_token() -> None:
    _refused(tiny_model().with_weight(Weight("token_embd.weight", (64, 299))), "300 tokens")
    _refused(tiny_model().with_weight(Weight("output.weight", (32, 300))), r"output\.weight")
    _refused(tiny_model().without_weight("token_embd.weight"), r"no tensor 'token_embd\.weight'")


@pytest.mark.parametrize(
    ("name", "shape", "kind", "reason"),
    [
        ("blk.0.attn_norm.weight", (64,), 1, "must be F32"),
        ("blk.0.attn_norm.weight", (64,), 8, "must be F32"),
        ("output_norm.weight", (64,), 26, "must be F32"),
        ("blk.0.attn_q.bias", (64, 1), 1, "must be F32"),
        ("rope_freqs.weight", (8,), 30, "must be F32"),
        ("blk.0.attn_q.weight", (64, 64), 24, "no type of a weight"),
        ("blk.0.attn_q.weight", (64, 64), 28, "no type of a weight"),
        ("token_embd.weight", (64, 300), 26, "no type of a weight"),
        ("output.weight", (64, 300), 40, "NVFP4"),
    ],
)
def test_tensor_types_llama_cpp_would_abort_on(
    name: str, shape: tuple[int, ...], kind: int, reason: str
) -> None:
    with pytest.raises((ModelMalformed, ModelUnsupported), match=reason):
        _check(tiny_model().with_weight(Weight(name, shape, kind)))


def test_phi3_without_any_attention_weights() -> None:
    _refused(tiny_model("phi3").without_weight("blk.0.attn_k.weight"), "attn_qkv")


TOKENS = [chr(256 + i) for i in range(300)]


@pytest.mark.parametrize(
    ("key", "kind", "value", "element", "reason"),
    [
        ("model", U32, 1, None, "must be a string"),
        ("model", STRING, "bert", None, "token_type_count"),
        ("model", STRING, "t5", None, "not supported"),
        ("model", STRING, "none", None, "not supported"),
        ("model", STRING, "llama", None, "no token for byte 0"),
        ("tokens", STRING, "x", None, "must be an array of strings"),
        ("tokens", ARRAY, [], STRING, "0 tokens"),
        ("tokens", ARRAY, [*TOKENS[:-1], TOKENS[0]], STRING, "token 299 .* occurs twice"),
        ("tokens", ARRAY, ["", *TOKENS[2:], "[EMPTY_0]"], STRING, "occurs twice"),
        ("tokens", ARRAY, ["x" * 4097, *TOKENS[1:]], STRING, "longer than 4096"),
        ("token_type", ARRAY, [1] * 299, I32, "299 elements for 300 tokens"),
        ("token_type", ARRAY, [1] * 299 + [7], I32, "outside 0 to 6"),
        ("token_type", ARRAY, [1] * 299 + [-1], I32, "outside 0 to 6"),
        ("token_type", ARRAY, [1] * 299 + [6], I32, "not written like"),
        ("scores", ARRAY, [0.0] * 299, F32, "299 elements"),
        ("scores", ARRAY, [0.0] * 299 + [math.nan], F32, "not a number"),
        ("merges", ARRAY, ["ab"], STRING, "two parts"),
        ("merges", ARRAY, ["a "], STRING, "two parts"),
        ("merges", ARRAY, [" a"], STRING, "two parts"),
        ("merges", ARRAY, [1], U32, "array of strings"),
        ("bos_token_id", U32, 300, None, "one of 300 tokens"),
        ("eos_token_id", U32, (1 << 32) - 1, None, "one of 300 tokens"),
        ("padding_token_id", I32, -1, None, "one of 300 tokens"),
        ("add_bos_token", U32, 1, None, "must be a bool"),
        ("add_sep_token", BOOL, 1, None, "no such token"),
    ],
)
def test_tokenizers(key: str, kind: int, value: Any, element: int | None, reason: str) -> None:
    with pytest.raises((ModelMalformed, ModelUnsupported), match=reason):
        _check(tiny_model().with_key(f"tokenizer.ggml.{key}", kind, value, element))


def test_a_tokenizer_of_bytes_passes() -> None:
    tokens = [*(f"<0x{b:02X}>" for b in range(256)), *TOKENS[:44]]
    file = tiny_model().with_key("tokenizer.ggml.model", STRING, "llama")
    file = file.with_key("tokenizer.ggml.tokens", ARRAY, tokens, STRING)
    _check(file.with_key("tokenizer.ggml.token_type", ARRAY, [6] * 256 + [1] * 44, I32))
    broken = file.with_key("tokenizer.ggml.tokens", ARRAY, ["<0xZZ>", *tokens[1:]], STRING)
    _refused(broken.with_key("tokenizer.ggml.token_type", ARRAY, [6] * 256 + [1] * 44, I32), "byte")


def test_a_vocabulary_too_small_for_the_bos_token_llama_cpp_assumes() -> None:
    file = (
        tiny_model()
        .without_key("tokenizer.ggml.bos_token_id")
        .with_weight(Weight("token_embd.weight", (64, 5)))
    )
    file = file.with_weight(Weight("output.weight", (64, 5))).with_key(
        "tokenizer.ggml.tokens", ARRAY, TOKENS[:5], STRING
    )
    file = file.with_key("tokenizer.ggml.token_type", ARRAY, [1] * 5, I32)
    _refused(file, "no such token to add")
    _check(file.with_key("tokenizer.ggml.add_bos_token", BOOL, 0))
