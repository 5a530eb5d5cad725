"""Sessions for tests that need no model."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from flexserve.engine.sessions import StateMemory
from flexserve.sealed.session_file import Tokens


def tokens_of(ids: Iterable[int], batches: Iterable[int], name: str = "") -> Tokens:
    return Tokens(array("i", ids), array("i", batches), name)


def blob(size: int, fill: int = 7) -> StateMemory:
    """Memory of that size in which no byte is zero."""
    memory = StateMemory(size)
    with memory.view() as view:
        view[:] = bytes([fill]) * size
    return memory
