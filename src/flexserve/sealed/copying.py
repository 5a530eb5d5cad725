"""The two ends of making a device copy: checked plaintext out of a sealed model, ciphertext into a new file.

Both pass a mebibyte at a time through private memory, which is zeroed when it is given up. Knows segments, hashes
and tags; does not know what is done to the plaintext in between (engine.layout).
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ..core import SEGMENT_SIZE
from ..errors import SegmentNotAuthentic, StorageFailure
from .crypto import TAG_BYTES, SegmentCipher
from .files import pwrite_all
from .format import Plan, Region, RegionKind
from .reader import UnlockedModel, pread_exact

CHUNK_BYTES = SEGMENT_SIZE  # a multiple of every unit
Progress = Callable[[int, int], None]  # bytes done, bytes in total


class PrivateBuffer:
    """Memory that is in no dump and in no child, and is zeroed at the end."""

    def __init__(self, size: int) -> None:
        memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):
            memory.madvise(mmap.MADV_DONTDUMP)
            memory.madvise(mmap.MADV_DONTFORK)
        self.view = memoryview(memory)[:size]

    def close(self) -> None:
        """Zero it; its memory goes when the last view does."""
        ctypes.memset((ctypes.c_char * len(self.view)).from_buffer(self.view), 0, len(self.view))


class CheckedImage:
    """A sealed model's plaintext. Every segment's SHA-256 is compared with the vendor's before it is decrypted: a tag
    alone does not stop a file made by somebody who holds the model key."""

    def __init__(self, unlocked: UnlockedModel) -> None:
        self.unlocked = unlocked
        self._cipher = PrivateBuffer(CHUNK_BYTES + TAG_BYTES)
        self._plain = PrivateBuffer(CHUNK_BYTES)
        self._start = self._end = 0  # what of the image is in `_plain`

    def meta(self) -> bytes:
        """The GGUF header. Raises `SegmentNotAuthentic`, `StorageFailure`."""
        region = self.unlocked.manifest.region(RegionKind.META)
        out = b"".join(
            bytes(self._plain.view[: self._load(region, start)])
            for start in range(0, region.padded_bytes, CHUNK_BYTES)
        )
        self._start = self._end = 0
        return out[: region.length]

    def read(self, offset: int, out: memoryview) -> None:
        """Fill `out` from an image offset, within one region. Raises `SegmentNotAuthentic`, `StorageFailure`."""
        while out:
            if not self._start <= offset < self._end:
                self._load_image(offset)
            piece = self._plain.view[offset - self._start : self._end - self._start][: len(out)]
            out[: len(piece)] = piece
            out, offset = out[len(piece) :], offset + len(piece)

    def _load_image(self, offset: int) -> None:
        for region in self.unlocked.manifest.plan.regions[1:]:
            start = (offset - region.image_offset) // CHUNK_BYTES * CHUNK_BYTES
            if 0 <= start < region.padded_bytes:
                self._start = self._end = 0
                length = self._load(region, start)
                self._start = region.image_offset + start
                self._end = self._start + length
                return
        raise AssertionError(f"image offset {offset} is in no region")

    def _load(self, region: Region, start: int) -> int:
        """Read, check and decrypt a chunk of a region into `_plain`; returns its length."""
        length = min(CHUNK_BYTES, region.padded_bytes - start)
        cipher, unlocked = self._cipher.view, self.unlocked
        pread_exact(unlocked.sealed.fd, cipher[:length], region.file_offset + start)
        first = region.first_segment + start // region.unit_bytes
        units = range(0, length, region.unit_bytes)
        for index, at in enumerate(units, first):
            found = hashlib.sha256(cipher[at : min(at + region.unit_bytes, length)]).digest()
            if found != unlocked.manifest.hash(index):
                raise SegmentNotAuthentic(
                    f"segment {index} ({region.kind.name}) is not what the vendor signed"
                )
        # From the end: the tag of a segment goes where its successor's ciphertext begins.
        for index, at in reversed(list(enumerate(units, first))):
            end = min(at + region.unit_bytes, length)
            unlocked.decrypt_into(index, cipher[at : end + TAG_BYTES], self._plain.view[at:end])
        return length

    def close(self) -> None:
        self._cipher.close()
        self._plain.close()


class CopyWriter:
    """Encrypts what it is given, region by region, into the data part of a copy; collects the tags."""

    def __init__(self, fd: int, plan: Plan, cipher: SegmentCipher, progress: Progress) -> None:
        self._fd = fd
        self._plan = plan
        self._cipher = cipher
        self._progress = progress
        self._plain = PrivateBuffer(CHUNK_BYTES)
        self._out = memoryview(bytearray(CHUNK_BYTES + TAG_BYTES))
        self._used = 0  # of `_plain`
        self._region = plan.regions[0]
        self._written = 0  # of the region
        self.tags = bytearray(TAG_BYTES * plan.segment_count)

    @contextmanager
    def region(self, region: Region) -> Iterator[None]:
        """What is written in the block is this region's content, all of it. Raises `StorageFailure`."""
        self._region, self._written = region, 0
        yield
        self._flush()
        assert self._written == region.length, f"{region.kind.name} has {region.length} bytes"

    def write(self, plain: memoryview) -> None:
        """Append plaintext to the region. Raises `StorageFailure`."""
        while plain:
            piece = plain[: CHUNK_BYTES - self._used]
            self._plain.view[self._used : self._used + len(piece)] = piece
            self._used += len(piece)
            plain = plain[len(piece) :]
            if self._used == CHUNK_BYTES:
                self._flush()

    def zeros(self, count: int) -> None:
        """Append zeros: no tensor is there."""
        while count:
            size = min(count, CHUNK_BYTES)
            self.write(memoryview(bytes(size)))
            count -= size

    def _flush(self) -> None:
        region, length = self._region, self._used
        index = region.first_segment + self._written // region.unit_bytes
        for at in range(0, length, region.unit_bytes):
            unit = self._plain.view[at : min(at + region.unit_bytes, length)]
            end = at + len(unit)
            # The tag lands where the next unit's ciphertext will be, so it is taken at once.
            self._cipher.encrypt_into(region.kind, index, unit, len(unit), self._out[at : end + TAG_BYTES])
            self.tags[index * TAG_BYTES : (index + 1) * TAG_BYTES] = self._out[end : end + TAG_BYTES]
            index += 1
        offset = region.file_offset + self._written
        write_file(self._fd, self._out[:length], offset)
        self._written += length
        self._used = 0
        self._progress(
            offset + length - self._plan.data_offset, self._plan.file_bytes - self._plan.data_offset
        )

    def close(self) -> None:
        self._plain.close()


def write_file(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Raises `StorageFailure`."""
    try:
        pwrite_all(fd, data, offset)
    except OSError as error:
        raise StorageFailure(f"cannot write the device copy: {error.strerror}") from error
