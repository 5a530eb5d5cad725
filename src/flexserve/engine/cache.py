"""How much memory llama.cpp takes for what a model remembers of its tokens: keys and values, or a state.

Computed from a checked header before the context is made, because llama.cpp would ask for any amount. For the
architectures in `model_rules.REVIEWED` it is exactly what llama.cpp allocates; for the others it is an estimate
from above: every layer is taken to have both. Knows nothing of contexts. Source: llama_kv_cache and
llama_memory_recurrent of the pinned llama.cpp.
"""

from __future__ import annotations

import numpy as np

from ..sealed.family_rules import ENCODERS, RECURRENT
from ..sealed.gguf import GGUFHeader
from ..sealed.layout import EMBEDDING
from ..sealed.model_rules import REVIEWED

_F16, _F32 = 2, 4
CELL_PADDING = 256  # llama.cpp rounds the context up to it


def cache_bytes(header: GGUFHeader, context_tokens: int) -> int:
    """Bytes of keys, values and states for one sequence of `context_tokens`.

    Layers with a sliding window keep the whole context too: llama.cpp's default, which lets a later turn of a
    conversation go on from any point.
    """
    arch = header.architecture
    if arch in ENCODERS:
        return 0
    if arch in RECURRENT:
        return _state_bytes(header)
    cells = -(-context_tokens // CELL_PADDING) * CELL_PADDING
    attention = _attention_elements(header) * _F16 * cells
    return attention if arch in REVIEWED else attention + _state_bytes(header)


def pooled_bytes(header: GGUFHeader, context_tokens: int) -> int:
    """What computing an embedding of so many tokens takes at once, at most: all scores of one layer's attention in an
    encoder, all logits in a model that could also generate text."""
    if header.architecture in ENCODERS:
        return _number(header, "attention.head_count", 0) * context_tokens**2 * _F32
    embedding = next(t for t in header.tensors if t.name == EMBEDDING)
    return embedding.rows * context_tokens * _F32


def _number(header: GGUFHeader, key: str, default: int) -> int:
    value = header.metadata.get(f"{header.architecture}.{key}", default)
    if isinstance(value, np.ndarray):  # one for each layer
        return int(value.max(initial=0))
    return value if isinstance(value, int) else default


def _sum_over_layers(header: GGUFHeader, key: str, default: int) -> int:
    value = header.metadata.get(f"{header.architecture}.{key}")
    if isinstance(value, np.ndarray):
        return int(value.sum(dtype=np.int64))
    return _number(header, key, default) * _number(header, "block_count", 0)


def _attention_elements(header: GGUFHeader) -> int:
    """Of all layers, for one token."""
    heads = _number(header, "attention.head_count", 0)
    if not heads:
        return 0
    head = _number(header, "embedding_length", 0) // heads
    key = _number(header, "attention.key_length", head)
    value = _number(header, "attention.value_length", head)
    if header.architecture not in REVIEWED:  # layers may differ by kind
        key = max(key, _number(header, "attention.key_length_swa", 0))
        value = max(value, _number(header, "attention.value_length_swa", 0))
        value += _number(
            header, "attention.indexer.key_length", 0
        )  # a second cache, to choose what to attend to
    elif _number(header, "attention.key_length_mla", 0):
        value = 0  # the latent is both
    groups = _sum_over_layers(header, "attention.head_count_kv", heads)
    return groups * (key + value)


def _state_bytes(header: GGUFHeader) -> int:
    """Of Mamba's convolutions and scans; of what others call so, at most."""
    inner, state = _number(header, "ssm.inner_size", 0), _number(header, "ssm.state_size", 0)
    window = max(0, _number(header, "ssm.conv_kernel", 0) - 1)
    groups = _number(header, "ssm.group_count", 0)
    elements = window * (inner + 2 * groups * state) + inner * state
    if header.architecture not in REVIEWED:
        width = _number(header, "embedding_length", 0)
        heads = _number(header, "attention.head_count", 0)
        elements += width * _number(header, "wkv.head_size", 0) + 2 * width  # RWKV
        elements += width * _number(header, "shortconv.l_cache", 0)  # LFM2
        elements += heads * _number(header, "kda.head_dim", 0) ** 2  # Kimi
    return elements * _F32 * _number(header, "block_count", 0)
