"""Small secrets in memory that only this process can reach: not root through /proc, not a kernel bug through the
kernel's own map of memory, no core, no swap (memfd_secret(2)). Where the kernel has none, in ordinary locked memory.

Knows copies and how to wipe them; does not know what the secrets are. What it cannot do: Python and the libraries
below make copies while they compute with a secret. `wiping` has the C library overwrite whatever is freed meanwhile;
Python's own small objects have to be wiped by who holds them (`wipe`).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Iterator

_SYS_MEMFD_SECRET = 447  # on every architecture
_MADV_DONTFORK, _MADV_DONTDUMP = 10, 16
_M_PERTURB = -6
_PATTERN = 0xA5
SLOT_BYTES = 64
_PAGE = mmap.PAGESIZE
_BYTES_HEADER = bytes.__basicsize__ - 1  # CPython: the content follows it, and a zero
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class _Vault:
    """Pages cut into slots. One for the process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # garbage collection may give a slot while one is taken
        self._free: list[memoryview] = []
        self.ordinary = False
        self.is_secret: bool | None = None  # None: nothing was kept yet

    def take(self) -> memoryview:
        with self._lock:
            if not self._free:
                page = memoryview(self._page()).cast("B")
                self._free.extend(page[at : at + SLOT_BYTES] for at in range(0, _PAGE, SLOT_BYTES))
            return self._free.pop()

    def give(self, slot: memoryview) -> None:
        slot[:] = bytes(SLOT_BYTES)
        with self._lock:
            self._free.append(slot)

    def _page(self) -> ctypes.Array[ctypes.c_char]:
        fd = -1 if self.ordinary else int(_libc.syscall(_SYS_MEMFD_SECRET, os.O_CLOEXEC))
        self.is_secret = False
        if fd >= 0:
            # Not Python's mmap, which keeps a descriptor open: root could map it again through /proc/PID/fd.
            os.ftruncate(fd, _PAGE)
            address = _libc.mmap(None, _PAGE, _READ_WRITE, mmap.MAP_SHARED, fd, 0)
            os.close(fd)
            if address != _MAP_FAILED:
                self.is_secret = True
                _libc.madvise(address, _PAGE, _MADV_DONTFORK)
                return (ctypes.c_char * _PAGE).from_address(address)
        # No such call, or more than RLIMIT_MEMLOCK, which counts it.
        address = _libc.mmap(None, _PAGE, _READ_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if address == _MAP_FAILED:
            raise MemoryError
        if not self.ordinary:
            for advice in (_MADV_DONTFORK, _MADV_DONTDUMP):
                _libc.madvise(address, _PAGE, advice)
            _libc.mlock(address, _PAGE)
        return (ctypes.c_char * _PAGE).from_address(address)


_vault = _Vault()


def use_ordinary_memory() -> None:
    """For the tests that show what this module is worth."""
    _vault.ordinary = True


def is_secret() -> bool:
    """Whether what was kept so far is in secret memory."""
    return _vault.is_secret is True


class SecretBytes:
    """At most SLOT_BYTES bytes."""

    __slots__ = ("_length", "_slot")

    def __init__(self, source: bytes | bytearray | memoryview) -> None:
        """Keeps a copy; the source is the caller's to wipe."""
        assert len(source) <= SLOT_BYTES
        self._slot = _vault.take()
        self._length = len(source)
        self._slot[: self._length] = source

    def view(self) -> memoryview:
        """The bytes where they are, without a copy."""
        return self._slot[: self._length].toreadonly()

    def __del__(self) -> None:
        slot = getattr(self, "_slot", None)
        if slot is not None:
            _vault.give(slot)


def wipe(secret: bytes | bytearray | memoryview) -> None:
    """Overwrite the bytes with zeros, also an immutable `bytes`, which nobody may look at any more."""
    if not isinstance(secret, bytes):
        secret[:] = bytes(len(secret))
    elif len(secret) > 1:  # Python shares the shorter ones
        ctypes.memset(id(secret) + _BYTES_HEADER, 0, len(secret))


@contextlib.contextmanager
def wiping() -> Iterator[None]:
    """Let the C library overwrite all memory that is freed in the block, by any thread: libraries forget to."""
    mallopt = getattr(_libc, "mallopt", None)  # glibc
    if mallopt is None or _vault.ordinary:
        yield
        return
    mallopt(_M_PERTURB, _PATTERN)
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)
