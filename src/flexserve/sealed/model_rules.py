"""What a well-formed header must say before llama.cpp may load it (work in progress)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ModelMalformed

if TYPE_CHECKING:
    from .gguf import GGUFHeader


def check_model(header: GGUFHeader) -> None:
    """Refuse a header llama.cpp cannot load safely. Raises `ModelMalformed`, `ModelUnsupported`."""
    if not header.architecture:
        raise ModelMalformed("key 'general.architecture' is missing")
