"""What a well-formed header must say before llama.cpp may load the model.

llama.cpp refuses much of a bad model by itself, with an error. These rules are for the rest: values on
which the pinned version (llama-cpp-python 0.3.36) aborts the process, divides by zero, reads a tensor of the
wrong type or allocates without bound, at load or in the first forward pass. They were taken from its
load_hparams, load_arch_tensors, graph builders and CPU kernels. Shapes of weights that llama.cpp compares
with its hyperparameters anyway are not repeated here.

For the architectures in `REVIEWED` the rules cover what their code reads (family_rules.py for those that are not
dense decoders). The others in `NOT_REVIEWED` get the general rules only: their own keys were not reviewed. An
honest vendor's `flexserve seal` has llama.cpp load such a model in a trial first; a hostile vendor may still
crash the secure world with one (it is restarted, nothing leaks).

The tokenizer's rules are in tokenizer_rules.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ModelMalformed, ModelUnsupported
from .family_rules import (
    ENCODERS,
    LATENT,
    RECURRENT,
    REVIEWED_ENCODERS,
    check_encoder,
    check_latent,
    check_mixture,
    check_pooling,
    check_recurrent,
)
from .ggml_types import TENSOR_TYPES
from .tokenizer_rules import check_tokenizer

if TYPE_CHECKING:
    from .gguf import GGUFHeader, TensorInfo, Value

# Dense decoder-only transformers with one KV layout.
DENSE = frozenset(
    [
        "llama",
        "mistral3",
        "minicpm",
        "smollm3",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3",
        "phi3",
        "internlm2",
        "xverse",
    ]
)
MIXTURES = frozenset(("qwen3moe", "deepseek2"))
REVIEWED = DENSE | MIXTURES | LATENT | RECURRENT | REVIEWED_ENCODERS

# llama.cpp can compute these too, from token ids alone (src/llama-arch.cpp). Their own keys were not reviewed: `seal`
# has llama.cpp try them first.
_NOT_REVIEWED = """
    llama4 deci falcon grok gpt2 gptneox mpt baichuan starcoder refact bloom stablelm qwen qwen2moe qwen2vl
    qwen3next qwen3vl qwen3vlmoe qwen35 qwen35moe phi2 phimoe plamo plamo2 plamo3 codeshell orion
    minicpm3 gemma3n gemma4 starcoder2 jamba falcon-h1 command-r cohere2
    dbrx olmo olmo2 olmoe openelm arctic deepseek chatglm glm4 glm4moe bitnet jais jais2 nemotron
    nemotron_h nemotron_h_moe exaone exaone4 exaone-moe rwkv6 rwkv6qwen2 rwkv7 arwkv7 granite granitemoe
    granitehybrid chameleon plm bailingmoe bailingmoe2 dots1 arcee afmoe ernie4_5 ernie4_5-moe hunyuan-moe
    hunyuan-dense gpt-oss lfm2 lfm2moe smallthinker seed_oss grovemoe apertus minimax-m2 cogvlm
    pangu-embedded mistral4 mimo2 step35 maincoder kimi-linear cohere2moe qwen4exp deepseek32 deepseek4 glm-dsa hy_v3
    hy_v4 bailingmoe3 dots3note laguna granite_swa muse-glimmer mellum maple minimax-01 minimax-m3 kimi-k3 glm5-next
    talkie nanbeige spark2_5 paddleocr hunyuan_vl llama-embed hrm_text"""
NOT_REVIEWED = frozenset(_NOT_REVIEWED.split()) | (ENCODERS - REVIEWED_ENCODERS)
GENERATIVE = (REVIEWED | NOT_REVIEWED) - ENCODERS

# What llama.cpp also knows, and why it is refused.
_IMAGES, _SOUND = "it sees images and needs another program for them", "it makes sound"
_DRAFT, _DIFFUSION = "it only drafts for another model", "it makes text by diffusion, not token by token"
REFUSED = {
    "clip": _IMAGES,
    "deepseek2-ocr": _IMAGES,
    "dflash": _DRAFT,
    "dream": _DIFFUSION,
    "eagle3": _DRAFT,
    "gemma4-assistant": _DRAFT,
    "gptj": "llama.cpp knows its name but cannot compute it",
    "graniteswitch": "it switches between adapters inside, which nothing here can ask for",
    "llada": _DIFFUSION,
    "llada-moe": _DIFFUSION,
    "pockettts": _SOUND,
    "qwen3tts": _SOUND,
    "rnd1": _DIFFUSION,
    "t5": "its encoder and its decoder need a request of two parts",
    "t5encoder": "it is half of a model of two parts",
    "wavtokenizer-dec": _SOUND,
}

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
MAX_CONTEXT = 1 << 25
MAX_WIDTH = 1 << 20
MAX_TEMPLATE_BYTES = 256 << 10

# Their graphs assert that rope covers whole heads, and that keys and values are of one length.
_WHOLE_ROTATION = """apertus arcee arctic baichuan chameleon codeshell cogvlm dbrx deci deepseek dots1 ernie4_5
    ernie4_5-moe exaone exaone-moe exaone4 falcon granite grok grovemoe hunyuan-moe internlm2 jais2 llama llama4
    maincoder minicpm minimax-m2 mistral3 nemotron olmo olmo2 olmoe orion pangu-embedded plamo qwen2 qwen2moe
    qwen2vl qwen3 qwen3moe qwen3vl qwen3vlmoe seed_oss smallthinker smollm3 starcoder2 xverse"""
WHOLE_ROTATION = frozenset(_WHOLE_ROTATION.split())
_HEADS_FILL_WIDTH = frozenset(("qwen2", "phi3", "internlm2", "xverse")) | ENCODERS
_MAY_HAVE_EXPERTS = frozenset(("llama", "mistral3", "minicpm")) | MIXTURES  # of those reviewed
_FACTORS = ("norm", "rope_f", "ssm_conv1d", "sinks", "token_types")
_TABLES = ("tid2eid", "d2t", "masked_embd_ordering", "_ape")  # lookup tables of integers


def check_model(header: GGUFHeader) -> None:
    """Refuse a header that could harm llama.cpp, or that it cannot serve.

    Raises `ModelMalformed` naming the key or tensor and the rule, and `ModelUnsupported` for what is merely
    not supported.
    """
    arch = _check_general(header)
    rules = _Hyperparameters(header, arch)
    rules.check()
    vocabulary = check_tokenizer(header)
    _check_tensors(header, rules.layers, vocabulary)


def _check_general(header: GGUFHeader) -> str:
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise ModelMalformed("key 'general.architecture' must be a string")
    if arch not in GENERATIVE | ENCODERS:
        why = REFUSED.get(arch, "llama.cpp of this version does not know it")
        raise ModelUnsupported(f"architecture {arch[:64]!r} cannot be served: {why}")
    kind = _scalar(header, "general.type", "model")
    if kind != "model":
        raise ModelUnsupported(
            f"key 'general.type' says {kind!r}: only whole models can be served",
            hint="give an adapter beside its model: --adapter" if kind == "adapter" else "",
        )
    parts = _scalar(header, "split.count", 1)
    if not isinstance(parts, int) or parts > 1:
        raise ModelUnsupported(
            f"this is one of {parts} parts of a split model (key 'split.count')",
            hint="join the parts first: llama-gguf-split --merge",
        )
    template = header.metadata.get("tokenizer.chat_template", "")
    if not isinstance(template, str):
        raise ModelMalformed("key 'tokenizer.chat_template' must be a string")
    if len(template.encode()) > MAX_TEMPLATE_BYTES:
        raise ModelMalformed(f"key 'tokenizer.chat_template' is longer than {MAX_TEMPLATE_BYTES} bytes")
    for key, value in header.metadata.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ModelMalformed(f"key {key!r} is {value}: it must be finite")
        if (
            isinstance(value, np.ndarray)
            and value.dtype.kind == "f"
            and not key.startswith("tokenizer.")
            and not np.isfinite(value).all()
        ):
            raise ModelMalformed(f"key {key!r} has an element that is not finite")
    return arch


def _scalar(header: GGUFHeader, key: str, default: bool | int | str) -> bool | int | float | str:
    value = header.metadata.get(key, default)
    if not isinstance(value, bool | int | float | str):
        raise ModelMalformed(f"key {key!r} must be one value, not an array")
    return value


class _Hyperparameters:
    """The keys under the architecture's name, each fetched with its range."""

    def __init__(self, header: GGUFHeader, arch: str) -> None:
        self.header = header
        self.metadata = header.metadata
        self.arch = arch
        self.reviewed = arch in REVIEWED
        self.layers = self.integer("block_count", 1, MAX_LAYERS)

    def check(self) -> None:
        self.integer("context_length", 1, MAX_CONTEXT)
        width = self.integer("embedding_length", 1, MAX_WIDTH)
        encoder = self.arch in ENCODERS
        if self.arch in RECURRENT:
            check_recurrent(self, width)
        else:
            self._check_attention(width)
            self.per_layer("feed_forward_length", 1 if self.reviewed else 0, MAX_WIDTH)
        self._check_rope()
        self._check_experts()
        self._check_norms("layer_norm_epsilon" if encoder else "layer_norm_rms_epsilon")
        self.integer("attention.sliding_window", 0, MAX_CONTEXT, default=0)
        self.integer("nextn_predict_layers", 0, 0 if self.reviewed else self.layers - 1, default=0)
        if encoder:
            check_encoder(self)
        elif _scalar(self.header, f"{self.arch}.attention.causal", True) is not True:
            raise ModelUnsupported(f"key '{self.arch}.attention.causal': the model does not generate text")
        check_pooling(self, encoder=encoder)
        if self.reviewed:
            self.integer("embedding_length_out", width, width, default=width)
            self._check_sliding_window()

    def value(self, name: str) -> Value | None:
        return self.metadata.get(f"{self.arch}.{name}")

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        key = f"{self.arch}.{name}"
        value = self.metadata.get(key, default)
        if value is None:
            raise ModelMalformed(f"key {key!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelMalformed(f"key {key!r} must be an integer")
        if not low <= value <= high:
            raise ModelMalformed(f"key {key!r} is {value}: {low} to {high} is possible")
        return value

    def per_layer(self, name: str, low: int, high: int, default: int | None = None) -> list[int]:
        """A number, or an array with one for each layer. Reviewed architectures size every layer like the
        first one, so there the numbers must be equal."""
        key = f"{self.arch}.{name}"
        value = self.metadata.get(key)
        if not isinstance(value, np.ndarray):
            if value is None and default is None and not self.reviewed:
                return []
            return [self.integer(name, low, high, default)]
        if value.dtype.kind not in "iu" or len(value) != self.layers:
            raise ModelMalformed(f"key {key!r} must have one integer for each of {self.layers} layers")
        if int(value.min()) < low or int(value.max()) > high:
            raise ModelMalformed(f"key {key!r} has an element outside {low} to {high}")
        if self.reviewed and value.min() != value.max():
            raise ModelUnsupported(f"key {key!r}: layers of {self.arch} must not differ")
        return [int(n) for n in value]

    def _check_attention(self, width: int) -> None:
        least = 1 if self.reviewed else 0  # layers without attention have 0 heads
        heads = self.per_layer("attention.head_count", least, 65536)
        if not heads:
            return
        groups = self.per_layer("attention.head_count_kv", least, 65536, default=heads[0])
        for layer in range(max(len(heads), len(groups))):
            head, group = heads[layer % len(heads)], groups[layer % len(groups)]
            if head and group and head % group:
                raise ModelMalformed(
                    f"{head} attention heads cannot share {group} key-value heads "
                    f"(keys '{self.arch}.attention.head_count' and '.head_count_kv')"
                )
        if not heads[0]:
            return
        default = width // heads[0]
        key = self.integer("attention.key_length", 1, 65536, default=default)
        value = self.integer("attention.value_length", 1, 65536, default=default)
        rotated = self.integer("rope.dimension_count", 0, 65536, default=key)
        if self.arch in LATENT:
            check_latent(self, heads=heads[0], groups=groups[0], key=key, value=value, rotated=rotated)
            if rotated % 2:
                raise ModelMalformed(f"key '{self.arch}.rope.dimension_count' is odd: {rotated}")
            return
        whole = self.arch in WHOLE_ROTATION
        if rotated % 2 or not (rotated == key if whole else 2 * self.reviewed <= rotated <= key):
            raise ModelMalformed(
                f"key '{self.arch}.rope.dimension_count' is {rotated}, with heads of {key} elements"
            )
        if key != value and (whole or self.reviewed):
            raise ModelUnsupported(f"{self.arch} with key length {key} and value length {value}")
        if not self.reviewed:
            return
        if self.arch in _HEADS_FILL_WIDTH and key * heads[0] != width:
            raise ModelMalformed(f"{heads[0]} heads of {key} do not make up an embedding of {width}")
        for name, expected in (
            ("attention.key_length_swa", key),
            ("attention.value_length_swa", value),
            ("rope.dimension_count_swa", rotated),
        ):
            self.integer(name, expected, expected, default=expected)

    def _check_rope(self) -> None:
        scaling = _scalar(self.header, f"{self.arch}.rope.scaling.type", "linear")
        if scaling not in ("none", "linear", "yarn", "longrope"):
            raise ModelMalformed(f"key '{self.arch}.rope.scaling.type' is unknown: {str(scaling)[:64]!r}")
        self.integer("rope.scaling.original_context_length", 1, MAX_CONTEXT, default=1)
        for name in ("rope.freq_base", "rope.freq_base_swa"):
            self._float(name, 1e-3, 1e12)
        for name in ("rope.scaling.factor", "rope.scale_linear"):
            self._float(name, 0.0, 1e6)

    def _check_sliding_window(self) -> None:
        """llama.cpp wants at least one layer with a sliding window, if the architecture has them."""
        name = "attention.sliding_window_pattern"
        pattern = self.metadata.get(f"{self.arch}.{name}")
        if not isinstance(pattern, np.ndarray):
            self.integer(name, 2, MAX_LAYERS, default=2)
        elif pattern.dtype.kind not in "iub" or len(pattern) != self.layers or not pattern.any():
            raise ModelMalformed(
                f"key '{self.arch}.{name}' must say for each of {self.layers} layers whether it slides"
            )

    def _check_experts(self) -> None:
        experts = self.integer("expert_count", 0, MAX_EXPERTS, default=0)
        used = self.per_layer("expert_used_count", 0, experts, default=0)
        groups = self.integer("expert_group_count", 0, max(0, experts - 1), default=0)
        self.integer("expert_gating_func", 0, 4, default=0)
        if experts and not max(used):
            raise ModelMalformed(f"key '{self.arch}.expert_used_count' must be at least 1")
        if self.arch in MIXTURES:
            check_mixture(self)
        if groups > 1:
            if experts % groups or experts // groups < 2:  # the best two of each group are compared
                raise ModelMalformed(
                    f"{experts} experts cannot be put into {groups} equal groups of two or more"
                )
            self.integer("expert_group_used_count", 1, groups - 1)
        if experts and self.reviewed and self.arch not in _MAY_HAVE_EXPERTS:
            raise ModelMalformed(f"key '{self.arch}.expert_count': {self.arch} has no experts")

    def _check_norms(self, needed: str) -> None:
        for name in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
            self._float(name, 0.0, 1.0)
        if self.reviewed and f"{self.arch}.attention.{needed}" not in self.metadata:
            raise ModelMalformed(f"key '{self.arch}.attention.{needed}' is missing")

    def _float(self, name: str, low: float, high: float) -> None:
        key = f"{self.arch}.{name}"
        value = self.metadata.get(key)
        if value is None:
            return
        if not isinstance(value, float):
            raise ModelMalformed(f"key {key!r} must be a float")
        if not low <= value <= high:
            raise ModelMalformed(f"key {key!r} is {value}: {low} to {high} is possible")


def _check_tensors(header: GGUFHeader, layers: int, vocabulary: int) -> None:
    arch = header.architecture
    by_name = {t.name: t for t in header.tensors}
    embedding = by_name.get("token_embd.weight")
    if embedding is None:
        raise ModelMalformed("the model has no tensor 'token_embd.weight'")
    width = header.metadata[f"{arch}.embedding_length"]
    for name in ("token_embd.weight", "output.weight"):
        tensor = by_name.get(name)
        if tensor is not None and tensor.shape != (width, vocabulary):
            raise ModelMalformed(
                f"tensor {name!r} has shape {tensor.shape}: {width} elements for each of {vocabulary} tokens "
                f"are expected"
            )
    for tensor in header.tensors:
        _check_type(tensor)
    if arch == "phi3":
        for layer in range(layers):
            fused = f"blk.{layer}.attn_qkv.weight" in by_name
            if not fused and any(f"blk.{layer}.attn_{part}.weight" not in by_name for part in "qkv"):
                raise ModelMalformed(f"layer {layer} has no tensor 'attn_qkv.weight'")


def _check_type(tensor: TensorInfo) -> None:
    """ggml's CPU kernels abort on the wrong type: vectors and norms are added or multiplied as F32, matrices
    need a type with a dot product."""
    kind = TENSOR_TYPES[tensor.type]
    if any(part in tensor.name for part in _TABLES):
        return
    if kind.name == "NVFP4":
        raise ModelUnsupported(f"tensor {tensor.name!r} has type NVFP4")
    vector = tensor.elements == tensor.shape[0] or tensor.name.endswith(".bias")
    factor = any(part in tensor.name for part in _FACTORS) or tensor.name.endswith((".ssm_a", ".ssm_d"))
    if (vector or factor) and kind.name != "F32":
        raise ModelMalformed(f"tensor {tensor.name!r} has type {kind.name}: vectors and norms must be F32")
    if not kind.matmul:
        raise ModelMalformed(f"tensor {tensor.name!r} has type {kind.name}: no type of a weight")
