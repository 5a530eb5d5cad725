"""What every world offers the normal side. The contract suite in tests/contract runs against each.

A world is thread-safe: the gateway calls it from many threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..core import Event, ModelInfo, Request, WorldStatus


@dataclass(frozen=True)
class ModelSource:
    """A sealed model and its licence, as the normal world's storage holds them: ciphertext and no key.

    `copy`: the device's own copy in execution layout; None: the one beside the sealed model, where there is one.
    """

    name: str
    sealed: Path
    licence: Path
    copy: Path | None = None
    use_copy: bool = True


class Generation(Protocol):
    """One answer in progress: an iterator of `Token` events that ends with one `Finished`.

    Iterating raises the error that ended the answer, if one did; nothing follows it.
    """

    def __iter__(self) -> Iterator[Event]: ...

    def __next__(self) -> Event: ...

    def cancel(self) -> None:
        """Stop computing soon; iteration then ends with `Finished(finish_reason="cancelled")`.

        May be called from any thread, more than once, and after the end.
        """


class World(Protocol):
    """The normal side's handle on a secure world."""

    @property
    def name(self) -> str: ...

    def start(self) -> None:
        """Start the secure world. Raises `EngineFailure`, `KeyProblem`."""

    def register(self, source: ModelSource) -> ModelInfo:
        """Authenticate a model and its licence and make it ready to answer, with no weight resident.

        Raises `NotFound`, `NotAuthentic`, `NotLicensed`, `ModelUnsupported`; then nothing is registered.
        """

    def generate(self, request: Request) -> Generation:
        """Queue a request. Raises `ModelNotFound`, `Busy`; later errors come from the iteration."""

    def recall(self, nbytes: int) -> int:
        """Take back up to `nbytes` of Flex-Mem now, zeroed first; returns the bytes given back."""

    def status(self) -> WorldStatus: ...

    def close(self) -> None:
        """End the secure world. Answers in flight end with `WorldCrashed`. May be called twice."""
