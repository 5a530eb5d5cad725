"""From ciphertext on storage to plaintext in a private buffer, a span of segments at a time.

Knows the two descriptors the normal world handed over (one that uses the page cache, one that does not) and
the model's key. Trusts neither file: every segment is authenticated, every short read is an error.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from dataclasses import dataclass
from typing import Protocol

from ..core import PAGE_SIZE, SEGMENT_SIZE
from ..errors import SealedTruncated, SegmentNotAuthentic, StorageFailure
from ..sealed.reader import UnlockedModel, pread_exact
from .arena import Span
from .uffd import MADV_DONTDUMP, MADV_DONTFORK, libc


class Staging:
    """A worker's two private, page-aligned buffers: ciphertext as read, and plaintext to be placed."""

    def __init__(self, size: int = SEGMENT_SIZE) -> None:
        self._cipher = mmap.mmap(-1, size + PAGE_SIZE)  # a page more: the tag goes behind the ciphertext
        self._plain = mmap.mmap(-1, size)
        for m in (self._cipher, self._plain):
            m.madvise(MADV_DONTFORK)
            m.madvise(MADV_DONTDUMP)
        self.cipher = memoryview(self._cipher)
        self.plain = memoryview(self._plain)
        self.address = _address(self._plain)
        self.used = False  # whether there may be plaintext in it

    def wipe(self) -> None:
        """Zero the plaintext, when the worker has nothing to do."""
        if self.used:
            libc.memset(self.address, 0, len(self.plain))
            self.used = False


def _address(m: mmap.mmap) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(m))


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
    """Segments of a sealed model. Safe to use from several threads, each with its own staging buffers."""

    def __init__(self, model: UnlockedModel, cached: int, direct: int | None) -> None:
        """`cached` and `direct` are descriptors of the same file, the second with O_DIRECT."""
        self._model = model
        self._cached = cached
        self._direct = direct
        self._nowait = hasattr(os, "RWF_NOWAIT") and direct is not None

    def fetch(self, span: Span, staging: Staging) -> FetchTimes:
        """See `Source.fetch`."""
        segments = self._model.segments
        start = time.perf_counter()
        try:
            self._read(segments[span.first].file_offset, staging.cipher[: span.length])
        except (SealedTruncated, StorageFailure) as error:
            # For whoever waits for the answer it is one failure: this segment cannot be had.
            raise SegmentNotAuthentic(f"segment {span.first} cannot be read: {error.message}") from error
        read = time.perf_counter()
        decrypt = self._model.decrypt_into
        at = span.length
        # From the end: the tag of a segment goes where its successor's ciphertext begins.
        for index in range(span.first + span.count - 1, span.first - 1, -1):
            length = segments[index].length
            at -= length
            decrypt(index, staging.cipher[at : at + length + 16], staging.plain[at : at + length])
        return FetchTimes(read - start, time.perf_counter() - read)

    def _read(self, offset: int, out: memoryview) -> None:
        """From the page cache when it is there, otherwise past it: a cold model must not fill the cache."""
        direct = self._direct
        if not self._nowait or direct is None:
            pread_exact(self._cached, out, offset)
            return
        done = 0
        try:
            while done < len(out):
                count = os.preadv(self._cached, [out[done:]], offset + done, os.RWF_NOWAIT)
                if count <= 0:
                    break
                done += count
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise StorageFailure(f"cannot read the sealed model at {offset}: {error.strerror}") from error
            if error.errno == errno.EOPNOTSUPP:
                self._nowait = False
        done -= done % PAGE_SIZE
        if done < len(out):
            self._read_direct(direct, offset + done, out[done:])

    def _read_direct(self, direct: int, offset: int, out: memoryview) -> None:
        try:
            pread_exact(direct, out, offset)
        except StorageFailure as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.EINVAL:
                raise
            # A file system that opens with O_DIRECT but wants another alignment than a page.
            self._direct = None
            pread_exact(self._cached, out, offset)
