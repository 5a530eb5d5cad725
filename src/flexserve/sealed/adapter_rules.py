"""What a LoRA adapter must be before llama.cpp may load it, and which model it fits.

As in model_rules.py, the rules are for what llama.cpp (llama-cpp-python 0.3.36) does not refuse by itself: a key of
another type aborts it, and so does the first forward pass when the two matrices of a pair do not fit each other, the
layers of experts, or an output matrix that is the embedding too. Taken from its llama_adapter_lora_init_impl,
build_lora_mm, build_lora_mm_id and build_inp_embd.

An adapter is a GGUF file of pairs: for the model's tensor X, of n rows of m elements, X.lora_a has r rows of m, and
X.lora_b n rows of r; r is the rank. For the token embedding X.lora_a is as long as the vocabulary, and has rows of r.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ModelMalformed, ModelUnsupported
from .family_rules import ENCODERS
from .model_rules import GENERATIVE

if TYPE_CHECKING:
    from .gguf import GGUFHeader, TensorInfo

MAX_ADAPTER_BYTES = 1 << 30  # it is decrypted in one piece
MAX_ADAPTER_META_BYTES = 4 << 20  # llama.cpp makes a text of every key's value
MAX_ALPHA = 1e6
TYPES = ("F32", "F16", "BF16", "Q8_0")  # what llama.cpp's converter writes

_EMBEDDING = "token_embd.weight"
_OUTPUT = "output.weight"
_IGNORED = "_norm.weight"  # llama.cpp passes over them
_A, _B = ".lora_a", ".lora_b"


def is_adapter(header: GGUFHeader) -> bool:
    """Whether a GGUF file says that it is an adapter and no model."""
    return header.metadata.get("general.type") == "adapter"


def check_adapter(header: GGUFHeader) -> None:
    """Refuse an adapter that could harm llama.cpp whatever the model, or that it cannot apply.

    Raises `ModelMalformed` naming the key or tensor and the rule, and `ModelUnsupported`.
    """
    if header.file_bytes > MAX_ADAPTER_BYTES:
        raise ModelUnsupported(
            f"the adapter has {header.file_bytes} bytes: at most {MAX_ADAPTER_BYTES} are possible"
        )
    if header.data_offset > MAX_ADAPTER_META_BYTES:
        raise ModelMalformed(f"the adapter's header is longer than {MAX_ADAPTER_META_BYTES} bytes")
    arch = _string(header, "general.architecture")
    if arch not in GENERATIVE | ENCODERS:
        raise ModelUnsupported(f"the adapter is for architecture {arch[:64]!r}, which cannot be served")
    if _string(header, "general.type") != "adapter":
        raise ModelMalformed("key 'general.type' does not say 'adapter'")
    kind = _string(header, "adapter.type")
    if kind != "lora":
        raise ModelUnsupported(f"key 'adapter.type' is {kind[:64]!r}: only 'lora' is possible")
    alpha = header.metadata.get("adapter.lora.alpha")
    if not isinstance(alpha, float) or header.types["adapter.lora.alpha"][0].name != "FLOAT32":
        raise ModelMalformed("key 'adapter.lora.alpha' must be a float32")
    if not math.isfinite(alpha) or abs(alpha) > MAX_ALPHA:
        raise ModelMalformed(f"key 'adapter.lora.alpha' is {alpha}: at most {MAX_ALPHA:.0f} is possible")
    if "adapter.alora.invocation_tokens" in header.metadata:
        raise ModelUnsupported(
            "the adapter is to be switched on by its own tokens (aLoRA): that is not possible"
        )
    for key, value in header.metadata.items():
        finite = value if isinstance(value, float) else None
        if finite is not None and not math.isfinite(finite):
            raise ModelMalformed(f"key {key!r} is {value}: it must be finite")
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ModelMalformed(f"key {key!r} has an element that is not finite")
    if not pairs(header):
        raise ModelMalformed("the adapter has no pair of tensors")


def pairs(header: GGUFHeader) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """The matrices A and B for each tensor of the model that they change. Raises `ModelMalformed`."""
    halves: dict[str, dict[str, TensorInfo]] = {_A: {}, _B: {}}
    for tensor in header.tensors:
        name, suffix = tensor.name[: -len(_A)], tensor.name[-len(_A) :]
        if suffix not in halves:
            if tensor.name.endswith(_IGNORED):
                continue
            raise ModelMalformed(f"tensor {tensor.name!r} ends in neither {_A} nor {_B}")
        if not name or ".lora_" in name:  # llama.cpp takes the suffix out wherever it stands
            raise ModelMalformed(f"tensor {tensor.name!r} has no name of a model's tensor before its suffix")
        if tensor.type_name not in TYPES:
            raise ModelUnsupported(
                f"tensor {tensor.name!r} has type {tensor.type_name}: {', '.join(TYPES)} are possible"
            )
        halves[suffix][name] = tensor
    for suffix, other in ((_A, _B), (_B, _A)):
        for name in halves[suffix]:
            if name not in halves[other]:
                raise ModelMalformed(f"tensor '{name}{suffix}' has no {other} beside it")
    found = {name: (a, halves[_B][name]) for name, a in halves[_A].items()}
    for name, (a, b) in found.items():
        rank_a = _four(a)[0 if _is_embedding(name) else 1]
        if rank_a != _four(b)[0]:
            raise ModelMalformed(f"the pair for {name!r} has rank {rank_a} in A and {_four(b)[0]} in B")
    return found


def check_fits(adapter: GGUFHeader, model: GGUFHeader) -> None:
    """Refuse a checked adapter that is not for this checked model. Raises `ModelUnsupported` with the reason."""
    if adapter.architecture != model.architecture:
        raise ModelUnsupported(
            f"the adapter is for a {adapter.architecture} model, and this is {model.architecture}"
        )
    there = {tensor.name: tensor for tensor in model.tensors}
    tied = _OUTPUT not in there and model.architecture not in ENCODERS
    for name, (a, b) in pairs(adapter).items():
        tensor = there.get(name)
        if tensor is None:
            raise ModelUnsupported(f"the adapter changes tensor {name!r}, which the model does not have")
        width, rows, *layers = _four(tensor)
        if _is_embedding(name):
            if tied:
                raise ModelUnsupported(
                    f"the adapter changes {name!r}, which is the model's output matrix too: llama.cpp cannot do that"
                )
            fits = (_four(a)[1], _four(b)[1]) == (rows, width)
        else:
            fits = (_four(a)[0], _four(b)[1]) == (width, rows)
        if not fits or _four(a)[2:] != (*layers,) or _four(b)[2:] != (*layers,):
            raise ModelUnsupported(
                f"the adapter's pair for {name!r} has shapes {a.shape} and {b.shape}, "
                f"and the model's tensor has {tensor.shape}"
            )


def _is_embedding(name: str) -> bool:
    return name.endswith(_EMBEDDING)


def _four(tensor: TensorInfo) -> tuple[int, ...]:
    return (*tensor.shape, 1, 1, 1, 1)[:4]


def _string(header: GGUFHeader, key: str) -> str:
    value = header.metadata.get(key)
    if not isinstance(value, str):
        raise ModelMalformed(f"key {key!r} must be a string")
    return value
