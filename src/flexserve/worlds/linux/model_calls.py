"""Registering and optimizing models: what of storage goes to the secure process, and which state comes back.

Knows sealed files, licences and the device's state file as bytes; neither keys nor what the process makes of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ...core import DeviceCopyInfo, ModelInfo
from ...sealed import statefile
from ...sealed.files import replacing
from ..base import ModelSource
from .channel import Optimize, Optimized, Register, Registered
from .process import SecureProcess
from .storage import Storage

_Answer = TypeVar("_Answer")
_Licensed = TypeVar("_Licensed", Registered, Optimized)


class Call(Protocol):
    """`LinuxWorld._call`: send a message, wait for its answer."""

    def __call__(
        self,
        kind: type[_Answer],
        make: Callable[[int], Any],
        descriptors: tuple[int, ...] = (),
        process: SecureProcess | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> _Answer: ...


class ModelCalls:
    """Thread-safe; who registers at the same time waits for the state file's lock."""

    def __init__(self, storage: Storage, state_path: Callable[[], Path], call: Call) -> None:
        self._storage = storage
        self._state_path = state_path
        self._call = call

    def register(self, source: ModelSource, process: SecureProcess) -> ModelInfo:
        """Raises what `World.register` does, `WorldCrashed`."""
        descriptors = self._storage.open_sealed(source.sealed)
        copies = self._storage.open_copy(source)
        adapters: list[int] = []
        try:
            use = self._storage.open_adapter(source.adapter, adapters)
            answer = self._with_licence(
                source,
                lambda licence, state: self._call(
                    Registered,
                    lambda call: Register(
                        *(call, source.name, licence, state, len(descriptors)),
                        None if copies is None else len(copies),
                        use,
                    ),
                    (*descriptors, *(copies or ()), *adapters),
                    process,
                ),
            )
        finally:
            for fd in (*descriptors, *(copies or ()), *adapters):
                os.close(fd)
        return answer.info

    def optimize(
        self, source: ModelSource, out: Path, progress: Callable[[int, int], None] | None
    ) -> DeviceCopyInfo:
        """See `LinuxWorld.optimize`."""
        with replacing(out) as target:
            descriptors = self._storage.open_sealed(source.sealed)
            try:
                answer = self._with_licence(
                    source,
                    lambda licence, state: self._call(
                        Optimized,
                        lambda call: Optimize(call, licence, state),
                        (descriptors[0], target),
                        progress=progress,
                    ),
                )
            finally:
                for fd in descriptors:
                    os.close(fd)
            os.fchmod(target, 0o600)
        return answer.copy

    def _with_licence(
        self, source: ModelSource, ask: Callable[[bytes, bytes | None], _Licensed]
    ) -> _Licensed:
        """What `ask` answers to the licence and the device's state; the answer brings the next state."""
        licence = self._storage.read_licence(source.licence)
        path = self._state_path()
        with statefile.locked(path):
            answer = ask(licence, statefile.load(path))
            statefile.store(path, answer.state)
        return answer
