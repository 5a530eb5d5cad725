"""From ciphertext on storage to plaintext in a private buffer, a span of segments at a time.

Knows the two descriptors the normal world handed over (one that uses the page cache, one that does not) and
the model's key. Trusts neither file: every segment is authenticated, every short read is an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import time
from dataclasses import dataclass
from typing import Protocol

from ..errors import SealedTruncated, SegmentNotAuthentic, StorageFailure
from ..sealed.crypto import TAG_BYTES
from ..sealed.reader import UnlockedImage, pread_exact
from . import uffd
from .arena import Span
from .uffd import libc

SLOTS = 64  # huge pages of address space for plaintext; one of them has memory behind it


class Staging:
    """A worker's two private buffers: ciphertext as read, and plaintext to be placed, a huge page of it at most.

    They are huge pages where the kernel gives them: a direct read into memory that is contiguous for the
    device is a few large transfers instead of a list of 4 KiB pages, and a whole huge page of plaintext is
    moved into the arena without a copy (docs/benchmarks.md).
    """

    def __init__(self) -> None:
        self._cipher = _reserve(2 * uffd.HUGE_PAGE)  # more than a page: the tag goes behind the ciphertext
        self._slots = _reserve(SLOTS * uffd.HUGE_PAGE)
        self._slot = 0
        self._all = _view(self._slots, SLOTS * uffd.HUGE_PAGE)
        self.cipher = _view(self._cipher, 2 * uffd.HUGE_PAGE)
        self._fresh = True  # whether `plain` has no memory behind it yet
        self.used = False  # whether there may be plaintext in it

    @property
    def address(self) -> int:
        """Where `plain` is."""
        return self._slots + self._slot * uffd.HUGE_PAGE

    @property
    def plain(self) -> memoryview:
        at = self._slot * uffd.HUGE_PAGE
        return self._all[at : at + uffd.HUGE_PAGE]

    def populate(self) -> None:
        """Touch fresh memory for the plaintext without the interpreter's lock.

        Decryption would do it holding that lock, one worker at a time. In a virtual machine whose host took
        the memory back the first touch costs more than all the rest (docs/benchmarks.md, idle).
        """
        if self._fresh:
            with contextlib.suppress(OSError):  # before Linux 5.14: then decryption touches it
                uffd.advise(self.address, uffd.HUGE_PAGE, uffd.MADV_POPULATE_WRITE)
            self._fresh = False

    def wipe(self) -> None:
        """Zero the plaintext, when the worker has nothing to do."""
        if self.used:
            libc.memset(self.address, 0, uffd.HUGE_PAGE)
            self.used = False

    def moved(self, nbytes: int) -> None:
        """The first `nbytes` of the plaintext have been moved away: go on with the next slot.

        The kernel may have left a page table behind, and gives no huge page to a range that has one. All slots are
        made anew at once, and seldom: that takes the process's memory lock, for which every other worker's first
        touch has to end before.
        """
        if nbytes < uffd.HUGE_PAGE:  # the kernel gave up half way, and the rest was copied
            libc.memset(self.address + nbytes, 0, uffd.HUGE_PAGE - nbytes)
        self._slot += 1
        if self._slot == SLOTS:
            uffd.renew(self._slots, SLOTS * uffd.HUGE_PAGE)
            _advise(self._slots, SLOTS * uffd.HUGE_PAGE)
            self._slot = 0
        self._fresh = True
        self.used = False

    def close(self) -> None:
        """Zero and give back both buffers; nothing may use them afterwards."""
        self.wipe()
        del self.cipher, self._all
        uffd.release(self._cipher, 2 * uffd.HUGE_PAGE)
        uffd.release(self._slots, SLOTS * uffd.HUGE_PAGE)


def _reserve(length: int) -> int:
    address = uffd.reserve(length, align=uffd.HUGE_PAGE)
    _advise(address, length)
    return address


def _advise(address: int, length: int) -> None:
    for advice in (uffd.MADV_DONTFORK, uffd.MADV_DONTDUMP):
        uffd.advise(address, length, advice)
    with contextlib.suppress(OSError):  # a kernel without huge pages: ordinary ones do
        uffd.advise(address, length, uffd.MADV_HUGEPAGE)


def _view(address: int, length: int) -> memoryview:
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B")


@dataclass(frozen=True)
class FetchTimes:
    """Seconds that one fetch took."""

    read_s: float
    decrypt_s: float


class Source(Protocol):
    """Where a loader gets plaintext from."""

    def fetch(self, span: Span, staging: Staging) -> FetchTimes:
        """Fill `staging.plain[:span.length]` with authentic plaintext.

        Raises `SegmentNotAuthentic`, `StorageFailure`; the buffer then holds nothing secret or unchecked
        that anybody may use.
        """


class SealedSource:
    """Segments of a sealed model or a device copy. For several threads, each with its own staging buffers."""

    def __init__(self, model: UnlockedImage, cached: int, direct: int | None) -> None:
        """`cached` and `direct` are descriptors of the same file, the second with O_DIRECT."""
        self._model = model
        self._cached = cached
        self._direct = direct

    def fetch(self, span: Span, staging: Staging) -> FetchTimes:
        """See `Source.fetch`."""
        start = time.perf_counter()
        try:
            self._read(self._model.segments[span.first].file_offset, staging.cipher[: span.length])
        except (SealedTruncated, StorageFailure) as error:
            # For whoever waits for the answer it is one failure: this segment cannot be had.
            raise SegmentNotAuthentic(f"segment {span.first} cannot be read: {error.message}") from error
        read = time.perf_counter()
        self._model.decrypt_run_into(
            span.first, span.count, staging.cipher[: span.length + TAG_BYTES], staging.plain[: span.length]
        )
        return FetchTimes(read - start, time.perf_counter() - read)

    def _read(self, offset: int, out: memoryview) -> None:
        """From the page cache when all of it is there, otherwise past it: a cold model must not fill the cache.

        Trying with RWF_NOWAIT instead would start the kernel's read-ahead, which does fill it.
        """
        direct = self._direct
        if direct is None or uffd.cached_bytes(self._cached, offset, len(out)) >= len(out):
            pread_exact(self._cached, out, offset)
        else:
            self._read_direct(direct, offset, out)

    def _read_direct(self, direct: int, offset: int, out: memoryview) -> None:
        try:
            pread_exact(direct, out, offset)
        except StorageFailure as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.EINVAL:
                raise
            # A file system that opens with O_DIRECT but wants another alignment than a page.
            self._direct = None
            pread_exact(self._cached, out, offset)
