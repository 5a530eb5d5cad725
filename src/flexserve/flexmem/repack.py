"""What llama.cpp's CPU backend repacks, and the repacking itself: all of it asked of ggml, nothing known here.

A plain llama.cpp gives quantised matrices that its processor has special kernels for another layout of the same
size when it loads them (buffer type CPU_REPACK). Which ones, and how, depends on the processor and on ggml's
version: so a device's own copy in this layout names both (`this_engine`). Knows ggml's functions and plaintext
weights; knows no file and no key.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

from ..errors import ModelUnsupported
from ..sealed.device_copy import CPU_BYTES, Engine
from ..sealed.ggml_types import TENSOR_TYPES
from .ggml import PINNED_BINDING, _InitParams, ggml_base

REPACK_TYPE = b"CPU_REPACK"
CHUNK_ROWS = 64  # a multiple of every interleave (4, 8, 16): so many rows repack like the whole matrix does
_DEVICE_CPU = 0  # enum ggml_backend_dev_type


class _Feature(ctypes.Structure):  # struct ggml_backend_feature, public
    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_char_p))


@cache
def _cpu() -> tuple[int, int]:
    """The CPU device and its registry."""
    device = ggml_base().ggml_backend_dev_by_type(_DEVICE_CPU)
    return device, ggml_base().ggml_backend_dev_backend_reg(device)


def _function(name: bytes, result: Any) -> Any:
    """One of the functions that ggml's registry gives out by name; None when this build has it not."""
    address = ggml_base().ggml_backend_reg_get_proc_address(_cpu()[1], name)
    return ctypes.CFUNCTYPE(result, ctypes.c_void_p)(address) if address else None


@cache
def extra_buffer_types() -> dict[bytes, int]:
    """The CPU backend's special buffer types, by name, in the order in which llama.cpp prefers them."""
    get = _function(b"ggml_backend_dev_get_extra_bufts", ctypes.POINTER(ctypes.c_void_p))
    found: dict[bytes, int] = {}
    if get is not None:
        types = get(_cpu()[0])
        for index in range(64):
            if not types or not types[index]:
                break
            found[ggml_base().ggml_backend_buft_name(types[index])] = types[index]
    return found


def why_not() -> str | None:
    """Why there is no execution layout on this machine; None when there is one."""
    others = [name.decode() for name in extra_buffer_types() if name != REPACK_TYPE]
    if others:
        return f"llama.cpp prefers {others[0]} buffers here, which FlexServe cannot lay out"
    if not extra_buffer_types():
        return "this llama.cpp repacks nothing"
    return None


@contextmanager
def donor() -> Iterator[int]:
    """A real buffer of the repacking type, for `ArenaBufferType.redirected`."""
    buffer = ggml_base().ggml_backend_buft_alloc_buffer(extra_buffer_types()[REPACK_TYPE], 64)
    if not buffer:
        raise MemoryError
    try:
        yield buffer
    finally:
        ggml_base().ggml_backend_buffer_free(buffer)


class Repacker:
    """Repacks rows of one kind: `rows` at a time, each of `row_elements` elements of a ggml type."""

    def __init__(self, ggml_type: int, row_elements: int, rows: int) -> None:
        """Raises `ModelUnsupported` when ggml does not repack these."""
        base = ggml_base()
        self._context = base.ggml_init(_InitParams(1 << 12, None, True))
        self._tensor = base.ggml_new_tensor_4d(self._context, ggml_type, row_elements, rows, 1, 1)
        self._buffer = base.ggml_backend_alloc_ctx_tensors_from_buft(
            self._context, extra_buffer_types()[REPACK_TYPE]
        )
        if not self._buffer:
            base.ggml_free(self._context)
            raise MemoryError
        self.nbytes = int(base.ggml_nbytes(self._tensor))
        self._out = base.ggml_get_data(self._tensor)
        if not _kernels(self._tensor):
            self.close()
            raise ModelUnsupported(f"ggml does not repack {rows} rows of {row_elements} elements here")

    def repack(self, rows: memoryview, out: memoryview) -> None:
        """Both have `nbytes` bytes and are writable memory."""
        assert len(rows) == len(out) == self.nbytes
        source = (ctypes.c_char * self.nbytes).from_buffer(rows)
        target = (ctypes.c_char * self.nbytes).from_buffer(out)
        ggml_base().ggml_backend_tensor_set(self._tensor, source, 0, self.nbytes)
        ctypes.memmove(target, self._out, self.nbytes)

    def close(self) -> None:
        """Zero and free its memory: it held weights."""
        ctypes.memset(self._out, 0, self.nbytes)
        ggml_base().ggml_backend_buffer_free(self._buffer)
        ggml_base().ggml_free(self._context)


def _kernels(tensor: int) -> int:
    """`ggml_tensor.extra`, which the repacking type's init_tensor sets: 0 when it has no kernels for it."""
    name = int(ggml_base().ggml_get_name(tensor))
    return int(ctypes.c_uint64.from_address(name + 64).value)  # behind char name[GGML_MAX_NAME]


@lru_cache(maxsize=1024)
def repacks(ggml_type: int, row_elements: int, rows: int) -> bool:
    """Whether ggml has repacked kernels for matrices of this type and shape on this processor.

    For estimates: which tensors of a model are repacked is llama.cpp's choice, also by their use.
    """
    if why_not() is not None or rows < 1:
        return False
    try:
        Repacker(ggml_type, row_elements, rows % CHUNK_ROWS or CHUNK_ROWS).close()
    except ModelUnsupported:
        return False
    return True


@cache
def this_engine() -> Engine:
    """This process's llama.cpp on this machine."""
    base = ggml_base()
    engine = f"llama-cpp-python-{PINNED_BINDING}_ggml-{base.ggml_version().decode()}"
    names = [platform.machine()]
    features = _function(b"ggml_backend_get_features", ctypes.POINTER(_Feature))
    if features is not None:
        for feature in features(_cpu()[1]):
            if not feature.name:
                break
            value = feature.value.decode()
            names.append(feature.name.decode() + ("" if value == "1" else f"-{value}"))
    cpu = " ".join(names)
    digest = hashlib.sha256(f"{engine}\n{cpu}\n{base.ggml_commit().decode()}\n".encode())
    for number, kind in sorted(TENSOR_TYPES.items()):
        digest.update(f"{kind.name}\n".encode())
        if kind.block == 1 or not repacks(number, 256, CHUNK_ROWS):
            continue
        repacker = Repacker(number, 256, CHUNK_ROWS)
        pattern = random.Random(number).randbytes(repacker.nbytes)  # noqa: S311  # a fixed pattern
        out = bytearray(repacker.nbytes)
        repacker.repack(memoryview(bytearray(pattern)), memoryview(out))
        repacker.close()
        digest.update(out)
    return Engine(engine, cpu[:CPU_BYTES], digest.digest())  # the digest has the whole of it
