"""Small random LoRA adapters for any model, right or wrong in one thing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from flexserve.sealed.gguf import GGUFHeader, TensorInfo, read_header

from .sealed.gguf_bytes import F32, STRING, File, Key, Weight

F32_TYPE, F16_TYPE = 0, 1
RANK, ALPHA = 4, 8.0


def adapter_for(
    model: GGUFHeader,
    tensors: Iterable[str] | None = None,
    *,
    rank: int = RANK,
    alpha: float = ALPHA,
    type_number: int = F32_TYPE,
    seed: int = 0,
) -> File:
    """An adapter that changes these tensors of the model; None: every matrix of its layers."""
    there = {t.name: t for t in model.tensors}
    names = list(tensors) if tensors is not None else [t.name for t in model.tensors if _is_matrix(t)]
    weights: list[Weight] = []
    for name in names:
        width, rows, *layers = there[name].shape
        if name == "token_embd.weight":
            a, b = (rank, rows, *layers), (rank, width, *layers)
        else:
            a, b = (width, rank, *layers), (rank, rows, *layers)
        weights += (Weight(f"{name}.lora_a", a, type_number), Weight(f"{name}.lora_b", b, type_number))
    return with_random_weights(
        File(
            keys=(
                Key("general.architecture", STRING, model.architecture),
                Key("general.type", STRING, "adapter"),
                Key("general.name", STRING, "random adapter"),
                Key("adapter.type", STRING, "lora"),
                Key("adapter.lora.alpha", F32, alpha),
            ),
            weights=tuple(weights),
        ),
        seed,
    )


def _is_matrix(tensor: TensorInfo) -> bool:
    return tensor.name.startswith("blk.") and len(tensor.shape) > 1


def with_random_weights(file: File, seed: int = 0) -> File:
    """The same adapter with values that change what a model says, and do not drown it."""
    rng = np.random.default_rng(seed)
    data = b""
    for weight in file.weights:
        dtype = {F32_TYPE: np.float32, F16_TYPE: np.float16}[weight.type]
        data += rng.normal(0, 0.2, int(np.prod(weight.shape))).astype(dtype).tobytes()
        data += bytes(-len(data) % file.alignment)
    return File(keys=file.keys, weights=file.weights, data=data)


def write_adapter(
    path: Path,
    model: Path,
    tensors: Iterable[str] | None = None,
    change: Callable[[File], File] = lambda file: file,
    *,
    rank: int = RANK,
    alpha: float = ALPHA,
    type_number: int = F32_TYPE,
) -> Path:
    """An adapter for a GGUF model, in a file."""
    made = adapter_for(read_header(model)[1], tensors, rank=rank, alpha=alpha, type_number=type_number)
    path.write_bytes(change(made).to_bytes())
    return path
