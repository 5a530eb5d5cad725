"""What this machine's storage and processors do alone: read, decrypt, place by copying. Bytes per second, wall time.

Each measures what the loader does (1 MiB segments, huge pages as staging) through the same calls, but nothing of
the loader itself. Knows no model: any file is read, a made-up key decrypts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ...core import SEGMENT_SIZE
from ...errors import StorageFailure
from ...flexmem import uffd
from ...flexmem.uffd import Userfaultfd, libc
from ...sealed.crypto import KEY_BYTES, TAG_BYTES, SegmentCipher


class Buffer:
    """Touched private memory, of huge pages or never of them."""

    def __init__(self, length: int, *, huge: bool) -> None:
        self.length = length
        self.address = uffd.reserve(length, align=uffd.HUGE_PAGE)
        with contextlib.suppress(OSError):
            uffd.advise(self.address, length, uffd.MADV_HUGEPAGE if huge else uffd.MADV_NOHUGEPAGE)
        libc.memset(self.address, 1, length)
        self.view = memoryview((ctypes.c_char * length).from_address(self.address)).cast("B")

    def close(self) -> None:
        del self.view
        uffd.release(self.address, self.length)


def together(count: int, work: Callable[[int], None]) -> float:
    """Run `work(0)` to `work(count - 1)` in threads; the seconds until all have ended. Raises what one raised."""
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - start


def read_bytes_per_s(path: Path, nbytes: int, *, depth: int, direct: bool = True, huge: bool = True) -> float:
    """Read the first `nbytes` of a file, `depth` segments in flight, past the page cache or through it.

    Raises `StorageFailure`.
    """
    total = min(nbytes, path.stat().st_size // SEGMENT_SIZE * SEGMENT_SIZE)
    if not total:
        raise StorageFailure(f"{path} is too short to measure reading")
    buffers = [Buffer(uffd.HUGE_PAGE, huge=huge) for _ in range(depth)]
    try:
        fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        try:

            def work(number: int) -> None:
                out = buffers[number].view[:SEGMENT_SIZE]
                for offset in range(number * SEGMENT_SIZE, total, depth * SEGMENT_SIZE):
                    done = 0
                    while done < SEGMENT_SIZE:  # a direct read may be short
                        count = os.preadv(fd, [out[done:]], offset + done)
                        if count <= 0:
                            raise StorageFailure(f"{path} ends early")
                        done += count
                out.release()

            return total / together(depth, work)
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageFailure(f"cannot read {path} with depth {depth}: {error.strerror}") from error
    finally:
        for buffer in buffers:
            buffer.close()


def decrypt_bytes_per_s(seconds: float, *, unit: int = SEGMENT_SIZE, threads: int = 1) -> float:
    """Authenticate and decrypt one hot unit again and again, in `threads` threads together."""
    cipher = SegmentCipher(secrets.token_bytes(KEY_BYTES), secrets.token_bytes(16), bytes(64), 1)
    sealed = bytearray(unit + TAG_BYTES)
    cipher.encrypt_into(1, 0, bytes(unit), unit, sealed)
    counts = [0] * threads

    def work(number: int) -> None:
        out = bytearray(unit)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            cipher.decrypt_into(1, 0, sealed, unit, out)
            counts[number] += 1

    took_s = together(threads, work)
    return sum(counts) * unit / took_s


def copy_s_per_gb(faults: Userfaultfd, target: int, nbytes: int) -> float:
    """UFFDIO_COPY into a registered range of `nbytes`, which is empty afterwards."""
    source = Buffer(SEGMENT_SIZE, huge=True)
    try:
        for _ in range(2):  # the second time the pages are those of the first
            start = time.perf_counter()
            for at in range(0, nbytes, SEGMENT_SIZE):
                faults.copy(target + at, source.address, SEGMENT_SIZE)
            seconds = time.perf_counter() - start
            uffd.advise(target, nbytes, uffd.MADV_DONTNEED)
        return seconds / (nbytes / 1e9)
    finally:
        source.close()
