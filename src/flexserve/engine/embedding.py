"""Which models make embeddings, of how long texts, and the form in which an embedding leaves the engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import EngineFailure, InvalidRequest
from ..sealed.family_rules import ENCODERS
from ..sealed.gguf import GGUFHeader

ENCODER_TOKENS = 2048  # a text's tokens are computed at once: memory grows with their number
DECODER_TOKENS = 512  # likewise, with a logit for each token and word of the vocabulary


def makes_embeddings(header: GGUFHeader) -> bool:
    """Whether the model says how to make one vector of a text (`pooling_type`; 0 is none)."""
    pooling = header.metadata.get(f"{header.architecture}.pooling_type", 0)
    return isinstance(pooling, int) and pooling > 0


def most_tokens(header: GGUFHeader) -> int:
    """How long a text may be unless the user chooses."""
    return ENCODER_TOKENS if header.architecture in ENCODERS else DECODER_TOKENS


def check_kind(*, embeds: bool, wanted: bool, model: str) -> None:
    """Raises `InvalidRequest` for text from a model that makes embeddings, and the other way round."""
    if embeds and not wanted:
        raise InvalidRequest(
            f"model {model!r} makes embeddings, no text", hint="ask /v1/embeddings, or `flexserve embed`"
        )
    if wanted and not embeds:
        raise InvalidRequest(f"model {model!r} makes text, no embeddings", hint="use an embedding model")


def packed(vector: Any) -> bytes:
    """A float32 vector scaled to length 1, as little-endian bytes; zeros stay zeros. Raises `EngineFailure` when it
    is not finite."""
    exact = vector.astype(np.float64)
    length = float(np.sqrt(np.sum(exact * exact)))
    if not np.isfinite(length):
        raise EngineFailure("the model made an embedding that is not finite")
    return bytes((exact / (length or 1.0)).astype("<f4").tobytes())
