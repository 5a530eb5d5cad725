"""Compute threads that stay where they are, one per processor.

llama.cpp's threads wait for each other hundreds of times per token. A scheduler that puts two of them on one
processor, as virtual machines that pack their processors do, makes them three times slower. Knows ggml's thread
pool (ggml.h, struct ggml_threadpool_params) and nothing of models.
"""

from __future__ import annotations

import ctypes
from typing import Any

from ..errors import EngineIncompatible
from ..flexmem.ggml import ggml_base
from ..flexmem.processors import PROCESSORS

_MAX_PROCESSORS = 512  # GGML_MAX_N_THREADS


class _Params(ctypes.Structure):  # struct ggml_threadpool_params
    _fields_ = (
        ("cpumask", ctypes.c_bool * _MAX_PROCESSORS),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


class BoundThreads:
    """A thread pool for one context. Close it after the context."""

    def __init__(self, processors: list[int]) -> None:
        """One thread on each of these. Raises `EngineIncompatible` when ggml's structure is not the one we know."""
        self._ggml = _prototypes()
        params = _Params()
        self._ggml.ggml_threadpool_params_init(ctypes.byref(params), len(processors))
        if params.n_threads != len(processors) or params.prio or params.strict_cpu or params.paused:
            raise EngineIncompatible("ggml's threadpool parameters are not what this FlexServe was made for")
        for processor in processors:
            params.cpumask[processor] = True
        params.strict_cpu = True
        self.handle = ctypes.c_void_p(self._ggml.ggml_threadpool_new(ctypes.byref(params)))

    def attach(self, context: Any) -> None:
        """Let a llama.cpp context compute with these threads."""
        self._ggml.llama_attach_threadpool(ctypes.cast(context, ctypes.c_void_p), self.handle, self.handle)

    def close(self) -> None:
        if self.handle:
            self._ggml.ggml_threadpool_free(self.handle)
            self.handle = ctypes.c_void_p(None)


def bind(context: Any, threads: int) -> BoundThreads | None:
    """Bind the threads of a llama.cpp context when there is one for each processor of this process.

    With fewer, the system's scheduler knows better which processors are free.
    """
    processors = sorted(PROCESSORS)
    if threads < 2 or threads != len(processors) or processors[-1] >= _MAX_PROCESSORS:
        return None
    bound = BoundThreads(processors)
    bound.attach(context)
    return bound


def _prototypes() -> Any:
    lib, pointer = ggml_base(), ctypes.c_void_p
    for name, result, arguments in (
        ("ggml_threadpool_params_init", None, [pointer, ctypes.c_int]),
        ("ggml_threadpool_new", pointer, [pointer]),
        ("ggml_threadpool_free", None, [pointer]),
        ("llama_attach_threadpool", None, [pointer, pointer, pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
