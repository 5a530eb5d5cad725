"""Rules for architectures that are not dense decoders: what their code divides by, indexes with or asserts.

Taken from load_arch_hparams, the graph builders and ggml's kernels of the pinned llama.cpp, like those in
model_rules.py, which calls these. Knows families; a model of a family none of these rules is for gets the
general rules only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ..errors import ModelMalformed, ModelUnsupported

if TYPE_CHECKING:
    from .gguf import Value

LATENT = frozenset(("deepseek2",))  # keys and values share one low-rank latent (MLA)
RECURRENT = frozenset(("mamba", "mamba2"))  # a state of fixed size instead of keys and values
REVIEWED_ENCODERS = frozenset(("bert", "nomic-bert"))
# No KV cache and no output matrix: they make embeddings.
ENCODERS = REVIEWED_ENCODERS | frozenset(
    "modern-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert gemma-embedding".split()  # noqa: SIM905
)

MAX_WIDTH = 1 << 20
MAX_HEADS = 65536
POOLING_NONE, POOLING_LAST, POOLING_RANK = 0, 3, 4  # enum llama_pooling_type


class Keys(Protocol):
    """The keys under the architecture's name (model_rules.py)."""

    arch: str

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int: ...

    def per_layer(self, name: str, low: int, high: int, default: int | None = None) -> list[int]: ...

    def value(self, name: str) -> Value | None: ...


def check_recurrent(keys: Keys, width: int) -> None:
    """Mamba: the scan splits `inner_size` into heads and groups, and the convolution keeps a window less one."""
    arch = keys.arch
    for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        keys.per_layer(name, 0, 0, default=0)
    keys.integer("expert_count", 0, 0, default=0)
    inner = keys.integer("ssm.inner_size", 1, MAX_WIDTH)
    keys.integer("ssm.conv_kernel", 2, 1024)
    keys.integer("ssm.state_size", 1, MAX_HEADS)
    rank = keys.integer("ssm.time_step_rank", 1, MAX_WIDTH)
    if arch == "mamba":
        keys.integer("ssm.group_count", 0, 0, default=0)
        if inner != 2 * width:
            raise ModelUnsupported(
                f"key '{arch}.ssm.inner_size' is {inner}: llama.cpp computes twice {width} only"
            )
        return
    groups = keys.integer("ssm.group_count", 1, MAX_HEADS)
    if inner % rank or inner % groups or rank % groups:
        raise ModelMalformed(
            f"{inner} elements cannot be shared by {rank} heads in {groups} groups "
            f"(keys '{arch}.ssm.inner_size', '.time_step_rank' and '.group_count')"
        )


def check_latent(keys: Keys, *, heads: int, groups: int, key: int, value: int, rotated: int) -> None:
    """DeepSeek's attention, in both of its forms: absorbed (the cache holds the latent alone) and unfolded."""
    arch = keys.arch
    rank = keys.integer("attention.kv_lora_rank", 1, MAX_WIDTH)
    keys.integer("attention.q_lora_rank", 0, MAX_WIDTH, default=0)
    full_key = keys.integer("attention.key_length_mla", 0, MAX_HEADS, default=0)
    full_value = keys.integer("attention.value_length_mla", 0, MAX_HEADS, default=0)
    if (full_key == 0) != (full_value == 0):
        raise ModelMalformed(
            f"keys '{arch}.attention.key_length_mla' and '.value_length_mla' must be given together"
        )
    if rotated < 2 or (full_key or key) <= rotated:
        raise ModelMalformed(
            f"key '{arch}.rope.dimension_count' is {rotated}, with heads of {full_key or key} elements"
        )
    if full_key and (key != rank + rotated or value != rank or groups != 1):
        raise ModelMalformed(
            f"the cache of {arch} holds one latent of {rank} and {rotated} rotated elements: key length {key}, "
            f"value length {value} and {groups} key-value heads do not fit"
        )
    if not full_key and groups != heads:
        raise ModelMalformed(f"{arch} needs as many key-value heads as heads, {heads}: it has {groups}")
    if keys.value("attention.temperature_scale") is not None:
        keys.integer("attention.temperature_length", 1, (1 << 32) - 1)


def check_mixture(keys: Keys) -> None:
    """A mixture of experts: its feed-forward length for each expert may be left out, the experts may not."""
    keys.integer("expert_count", 1, 1024)
    keys.per_layer("expert_feed_forward_length", 0, MAX_WIDTH, default=0)
    keys.integer("expert_shared_count", 0, 1024, default=0)
    keys.integer("leading_dense_block_count", 0, 1 << 16, default=0)


def check_encoder(keys: Keys) -> None:
    """BERT: every token sees every other, and one vector comes out of a text."""
    arch = keys.arch
    if keys.value("attention.causal") is not False:
        raise ModelMalformed(f"key '{arch}.attention.causal' must be false: {arch} reads in both directions")
    if arch in REVIEWED_ENCODERS:
        keys.integer("expert_count", 0, 0, default=0)
        keys.integer("attention.sliding_window", 0, 0, default=0)


def check_pooling(keys: Keys, *, encoder: bool) -> int:
    """How a model makes one vector of a text; 0: it makes none. Raises `ModelUnsupported`."""
    key = f"{keys.arch}.pooling_type"
    pooling = keys.integer("pooling_type", 0, POOLING_RANK, default=POOLING_NONE)
    if pooling == POOLING_RANK:
        raise ModelUnsupported(f"key {key!r}: models that rank texts are not supported")
    if encoder and pooling == POOLING_NONE:
        raise ModelUnsupported(f"key {key!r} does not say how to make one embedding of a text")
    return pooling
