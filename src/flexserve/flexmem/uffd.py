"""userfaultfd and the memory calls Flex-Mem needs, through ctypes (which releases the interpreter lock).

Knows the kernel's structures (Documentation/admin-guide/mm/userfaultfd.rst, include/uapi/linux/userfaultfd.h)
and nothing of segments or models. Offsets and lengths are bytes and multiples of PAGE_SIZE.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
from collections.abc import Iterator

from ..core import PAGE_SIZE
from ..errors import FlexServeError

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mlock2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.memset.restype = ctypes.c_void_p
libc.memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
libc.memmove.restype = ctypes.c_void_p

_SYS_CACHESTAT = 451  # on every architecture, Linux 6.5
_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_UFFD_API = 0xAA
_UFFD_USER_MODE_ONLY = 1
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_WAKE = 0x8010AA02
_UFFDIO_COPY = 0xC028AA03
_UFFDIO_ZEROPAGE = 0xC020AA04
_UFFDIO_MOVE = 0xC028AA05
_FEATURE_MOVE = 1 << 16  # Linux 6.8
_REGISTER_MODE_MISSING = 1
_EVENT_PAGEFAULT = 0x12
_MSG_SIZE = 32
_MREMAP_MAYMOVE_FIXED_DONTUNMAP = 1 | 2 | 4
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value

MADV_DONTNEED = 4
MADV_FREE = 8
MADV_DONTFORK = 10
MADV_DONTDUMP = 16
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_POPULATE_WRITE = 23
MADV_DONTNEED_LOCKED = 24
HUGE_PAGE = 2 << 20


class UffdDeniedError(FlexServeError):
    """This kernel does not let us use userfaultfd; Flex-Mem then loads fully before computing."""

    code = "userfaultfd_denied"


def _os_error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def reserve(length: int, *, align: int = 2 << 20) -> int:
    """Reserve `length` bytes of private address space with no memory behind it; returns its address."""
    got = libc.mmap(None, length + align, _READ_WRITE, _ANONYMOUS, -1, 0)
    if got == _MAP_FAILED:
        raise _os_error("mmap")
    address = -(-int(got) // align) * align
    if address > got:
        libc.munmap(got, address - got)
    libc.munmap(address + length, int(got) + align - address)
    return address


def release(address: int, length: int) -> None:
    """Undo `reserve`."""
    if libc.munmap(address, length) != 0:
        raise _os_error("munmap")


def advise(address: int, length: int, advice: int) -> None:
    """madvise(2)."""
    if libc.madvise(address, length, advice) != 0:
        raise _os_error("madvise")


def move_away(address: int, length: int) -> int:
    """Atomically take the pages of a range to a new address; the old range stays, with no page behind it.

    mremap(MREMAP_DONTUNMAP). A thread that touches the old range afterwards takes a missing-page fault,
    never a zeroed page. Returns the new address; the caller unmaps it.
    """
    # Where huge pages stay whole: at the same place within one.
    before = address % HUGE_PAGE
    target = reserve(before + length, align=HUGE_PAGE)
    if before:
        libc.munmap(target, before)
    got = libc.mremap(address, length, length, _MREMAP_MAYMOVE_FIXED_DONTUNMAP, target + before)
    if got == _MAP_FAILED:
        raise _os_error("mremap")
    return int(got)


def renew(address: int, length: int) -> None:
    """Make a private range as new: no pages, and no page table, so that the next touch may give a huge page."""
    got = libc.mmap(address, length, _READ_WRITE, _ANONYMOUS | _MAP_FIXED, -1, 0)
    if got == _MAP_FAILED:
        raise _os_error("mmap")


def resident_pages(address: int, length: int) -> bytearray:
    """One byte per page, 1 where a page is in memory right now (mincore(2))."""
    pages = length // PAGE_SIZE
    out = bytearray(pages)
    view = (ctypes.c_char * pages).from_buffer(out)
    if libc.mincore(address, length, ctypes.addressof(view)) != 0:
        raise _os_error("mincore")
    del view
    return out.translate(_LOW_BIT)


def cached_bytes(fd: int, offset: int, length: int) -> int:
    """How much of a file's range is in the page cache (cachestat(2)); 0 where the kernel does not tell."""
    span = ctypes.create_string_buffer(struct.pack("<QQ", offset, length))
    out = ctypes.create_string_buffer(40)
    if libc.syscall(_SYS_CACHESTAT, fd, span, out, 0) != 0:
        return 0
    return int(struct.unpack_from("<Q", out)[0]) * PAGE_SIZE


_LOW_BIT = bytes(i & 1 for i in range(256))


class Userfaultfd:
    """A userfaultfd for missing pages of ranges of this process. Thread-safe, as the kernel's object is."""

    def __init__(self) -> None:
        """Raises `UffdDeniedError` with the kernel's reason."""
        number = _SYS_USERFAULTFD.get(platform.machine())
        if number is None:
            raise UffdDeniedError(f"no userfaultfd on {platform.machine()}")
        fd = libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY)
        if fd < 0:
            raise UffdDeniedError(f"userfaultfd: {os.strerror(ctypes.get_errno())}")
        self.fd = fd
        api = ctypes.create_string_buffer(struct.pack("<QQQ", _UFFD_API, 0, 0))
        if libc.ioctl(fd, _UFFDIO_API, api) != 0:
            reason = os.strerror(ctypes.get_errno())
            os.close(fd)
            raise UffdDeniedError(f"UFFDIO_API: {reason}")
        features = struct.unpack_from("<Q", api, 8)[0]
        self.can_move = bool(features & _FEATURE_MOVE)

    def register(self, address: int, length: int) -> None:
        """Report missing pages of the range here."""
        arg = ctypes.create_string_buffer(struct.pack("<QQQQ", address, length, _REGISTER_MODE_MISSING, 0))
        if libc.ioctl(self.fd, _UFFDIO_REGISTER, arg) != 0:
            raise _os_error("UFFDIO_REGISTER")

    def _fill(self, request: int, code: str, address: int, length: int, source: int | None) -> int:
        """COPY and ZEROPAGE share one loop: both may stop early and both refuse a present page."""
        done = present = 0
        while done < length:
            fields = [address + done, length - done, 0, 0]
            if source is not None:
                fields = [address + done, source + done, length - done, 0, 0]
            arg = ctypes.create_string_buffer(struct.pack(code, *fields))
            if libc.ioctl(self.fd, request, arg) == 0:
                break
            number = ctypes.get_errno()
            copied = struct.unpack_from("<q", arg, len(arg) - 9)[0]
            if copied > 0:
                done += copied
            elif number == errno.EEXIST:
                done += PAGE_SIZE
                present += PAGE_SIZE
            elif number != errno.EAGAIN:
                raise OSError(number, f"userfaultfd fill: {os.strerror(number)}")
        if present:  # the kernel wakes waiters only for what it placed itself
            self.wake(address, length)
        return length - present

    def copy(self, address: int, source: int, length: int) -> int:
        """Place a copy of `source` at the missing pages of the range; returns the bytes placed.

        Pages already there are left as they are (EEXIST); partial copies are continued (EAGAIN).
        """
        return self._fill(_UFFDIO_COPY, "<QQQQq", address, length, source)

    def move(self, address: int, source: int, length: int) -> int:
        """Move whole pages from `source` to missing pages of the range: no copy, and `source` is empty behind it.

        Returns the bytes moved, from the start; fewer than `length` where the kernel cannot.
        """
        arg = ctypes.create_string_buffer(struct.pack("<QQQQq", address, source, length, 0, 0))
        if libc.ioctl(self.fd, _UFFDIO_MOVE, arg) == 0:
            return length
        return max(0, int(struct.unpack_from("<q", arg, 32)[0]))

    def zero(self, address: int, length: int) -> int:
        """Place zeros at the missing pages of the range; returns the bytes placed."""
        return self._fill(_UFFDIO_ZEROPAGE, "<QQQq", address, length, None)

    def wake(self, address: int, length: int) -> None:
        """Let threads that wait in the range try again."""
        arg = ctypes.create_string_buffer(struct.pack("<QQ", address, length))
        if libc.ioctl(self.fd, _UFFDIO_WAKE, arg) != 0:
            raise _os_error("UFFDIO_WAKE")

    def faults(self) -> Iterator[int]:
        """The page addresses that threads wait for right now; does not block."""
        try:
            data = os.read(self.fd, _MSG_SIZE * 64)
        except BlockingIOError:
            return
        for at in range(0, len(data), _MSG_SIZE):
            event, address = data[at], struct.unpack_from("<Q", data, at + 16)[0]
            if event == _EVENT_PAGEFAULT:
                yield address & ~(PAGE_SIZE - 1)

    def close(self) -> None:
        """Close it: the kernel then lets every waiting thread go on with zeros, so close last."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
