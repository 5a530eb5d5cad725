"""What a session costs: keeping, saving and restoring the KV of a prompt, against computing it again.

Knows one model and one prompt of random token ids; prints nothing. `flexserve bench memory` is to call it.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import llama_cpp

from ..engine import llama
from ..engine.llama import Context, ContextOptions, Model
from ..engine.model_sessions import ModelSessions
from ..engine.sessions import SessionStore
from ..sealed.keys import DeviceKey
from ..sealed.session_file import MadeBy

T = TypeVar("T")


@dataclass(frozen=True)
class SessionTimes:
    """Seconds, for `tokens` tokens. `restore_cold_s`: nothing of the file in the page cache."""

    tokens: int
    state_bytes: int
    compute_s: float
    keep_s: float
    resume_s: float  # from memory
    save_s: float  # encrypted and written, not synced
    restore_s: float
    restore_cold_s: float

    @property
    def session_restore_vs_recompute(self) -> float:
        """With a cold file."""
        return self.restore_cold_s / self.compute_s


def measure(gguf: Path, directory: Path, *, threads: int, tokens: int = 1024) -> SessionTimes:
    """`gguf`: a plain model; `directory`: where its session is saved. Weights are in memory before the clock starts.

    Raises `ModelUnsupported`, `StorageFailure`.
    """
    llama.start()
    model = Model.from_file(gguf, load_mode=llama_cpp.LLAMA_LOAD_MODE_NONE)
    context = Context(model, ContextOptions(2 * tokens, threads))
    try:
        rng = random.Random(0)  # noqa: S311 - a prompt of any tokens
        prompt = [rng.randrange(model.vocab.size) for _ in range(tokens)]
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            return _measure(context, prompt, os.dup(file.fileno()))
    finally:
        context.close()
        model.close()


def _measure(context: Context, prompt: list[int], fd: int) -> SessionTimes:
    device, store = DeviceKey.generate(), SessionStore(1 << 40)
    sessions = ModelSessions(store, MadeBy(bytes(32), "engine", "context"), whole_only=False)
    context.decode(prompt[:64])
    context.clear()
    _, compute_s = _timed(lambda: context.decode(prompt))
    _, keep_s = _timed(lambda: sessions.keep(context, ""))
    state_bytes = store.memory_bytes
    asked = [*prompt, 0]

    def resume() -> float:
        context.clear()
        (kept, seconds) = sessions.resume(context, asked)
        assert kept == len(prompt)
        return seconds

    resume_s = resume()
    _, save_s = _timed(lambda: store.save_one(device, fd))
    store.recall(1, saved=True)
    restore_s = resume()
    store.recall(1, saved=True)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    restore_cold_s = resume()
    store.close()  # and the descriptor
    return SessionTimes(
        len(prompt), state_bytes, compute_s, keep_s, resume_s, save_s, restore_s, restore_cold_s
    )


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began
