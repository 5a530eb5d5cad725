"""What this machine's parts do alone: read, decrypt, place, first touch. Bytes per second, wall time.

Each measures what the loader does (1 MiB segments, huge pages as staging) through the same calls, but nothing of
the loader itself: these are the limits it is compared with.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..core import SEGMENT_SIZE
from ..errors import StorageFailure
from ..flexmem import uffd
from ..flexmem.uffd import UffdDeniedError, Userfaultfd, libc
from ..sealed.crypto import KEY_BYTES, TAG_BYTES, SegmentCipher
from . import machine
from .memory import MADV_NOHUGEPAGE, first_touch_s_per_gb

DEPTHS = (1, 2, 4, 8)
READ_BYTES = 256 << 20  # for one rate
DECRYPT_S = 0.3
PLACE_BYTES = 256 << 20
_MADV_DONTNEED = 4


@dataclass(frozen=True)
class Placing:
    """Seconds per GB of one core. `first_touch` is what a fresh page costs whoever takes it."""

    copy_s_per_gb: float  # UFFDIO_COPY, its fresh pages included
    move_s_per_gb: (
        float | None
    )  # UFFDIO_MOVE of whole huge pages; the fresh ones for the next plaintext come on top
    first_touch_huge_s_per_gb: float
    first_touch_small_s_per_gb: float

    @property
    def bytes_per_s(self) -> float:
        """Of the better method, with the fresh pages it needs."""
        costs = [self.copy_s_per_gb]
        if self.move_s_per_gb is not None:
            costs.append(self.move_s_per_gb + self.first_touch_huge_s_per_gb)
        return 1e9 / min(costs)


class _Buffer:
    """Touched private memory, of huge pages or never of them."""

    def __init__(self, length: int, *, huge: bool) -> None:
        self.length = length
        self.address = uffd.reserve(length, align=uffd.HUGE_PAGE)
        with contextlib.suppress(OSError):
            uffd.advise(self.address, length, uffd.MADV_HUGEPAGE if huge else MADV_NOHUGEPAGE)
        libc.memset(self.address, 1, length)
        self.view = memoryview((ctypes.c_char * length).from_address(self.address)).cast("B")

    def close(self) -> None:
        del self.view
        uffd.release(self.address, self.length)


def _together(count: int, work: Callable[[int], None]) -> float:
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


def read_bytes_per_s(path: Path, *, depth: int, direct: bool = True, huge: bool = True) -> float:
    """Read the first READ_BYTES of a file, `depth` segments in flight, past the page cache or through it.

    Raises `StorageFailure`.
    """
    total = min(READ_BYTES, path.stat().st_size // SEGMENT_SIZE * SEGMENT_SIZE)
    if not total:
        raise StorageFailure(f"{path} is too short to measure reading")
    buffers = [_Buffer(uffd.HUGE_PAGE, huge=huge) for _ in range(depth)]
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

            return total / _together(depth, work)
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageFailure(f"cannot read {path} with depth {depth}: {error.strerror}") from error
    finally:
        for buffer in buffers:
            buffer.close()


def cached_bytes_per_s(path: Path) -> float:
    """Read a file that is in the page cache, in one thread."""
    read_bytes_per_s(path, depth=1, direct=False)
    rate = read_bytes_per_s(path, depth=1, direct=False)
    machine.evict(path)
    return rate


def decrypt_bytes_per_s(*, unit: int = SEGMENT_SIZE, threads: int = 1) -> float:
    """Authenticate and decrypt one hot unit again and again, in `threads` threads together."""
    cipher = SegmentCipher(secrets.token_bytes(KEY_BYTES), secrets.token_bytes(16), bytes(64), 1)
    sealed = bytearray(unit + TAG_BYTES)
    cipher.encrypt_into(1, 0, bytes(unit), unit, sealed)
    counts = [0] * threads

    def work(number: int) -> None:
        out = bytearray(unit)
        end = time.perf_counter() + DECRYPT_S
        while time.perf_counter() < end:
            cipher.decrypt_into(1, 0, sealed, unit, out)
            counts[number] += 1

    seconds = _together(threads, work)
    return sum(counts) * unit / seconds


def placing() -> Placing:
    """What it takes to put plaintext into an arena, in memory that was in use just before."""
    # Each twice: the second time it gets the memory of the first.
    huge = [first_touch_s_per_gb(PLACE_BYTES, huge=True) for _ in range(2)][-1]
    small = [first_touch_s_per_gb(PLACE_BYTES, huge=False) for _ in range(2)][-1]
    try:
        faults = Userfaultfd()
    except UffdDeniedError:
        return Placing(_memmove_s_per_gb(), None, huge, small)
    target = uffd.reserve(PLACE_BYTES, align=uffd.HUGE_PAGE)
    try:
        with contextlib.suppress(OSError):
            uffd.advise(target, PLACE_BYTES, uffd.MADV_HUGEPAGE)
        faults.register(target, PLACE_BYTES)
        return Placing(_copy_s_per_gb(faults, target), _move_s_per_gb(faults, target), huge, small)
    finally:
        faults.close()
        uffd.release(target, PLACE_BYTES)


def _copy_s_per_gb(faults: Userfaultfd, target: int) -> float:
    source = _Buffer(SEGMENT_SIZE, huge=True)
    try:
        for _ in range(2):  # the second time the pages are those of the first
            start = time.perf_counter()
            for at in range(0, PLACE_BYTES, SEGMENT_SIZE):
                faults.copy(target + at, source.address, SEGMENT_SIZE)
            seconds = time.perf_counter() - start
            uffd.advise(target, PLACE_BYTES, _MADV_DONTNEED)
        return seconds / (PLACE_BYTES / 1e9)
    finally:
        source.close()


def _move_s_per_gb(faults: Userfaultfd, target: int) -> float | None:
    """None where the kernel cannot, or does not give huge pages."""
    if not faults.can_move:
        return None
    source = uffd.reserve(uffd.HUGE_PAGE, align=uffd.HUGE_PAGE)
    try:
        for _ in range(2):
            seconds = 0.0
            for at in range(0, PLACE_BYTES, uffd.HUGE_PAGE):
                with contextlib.suppress(OSError):
                    uffd.advise(source, uffd.HUGE_PAGE, uffd.MADV_HUGEPAGE)
                uffd.advise(source, uffd.HUGE_PAGE, uffd.MADV_POPULATE_WRITE)
                start = time.perf_counter()
                moved = faults.move(target + at, source, uffd.HUGE_PAGE)
                seconds += time.perf_counter() - start
                if moved != uffd.HUGE_PAGE:
                    return None
                uffd.renew(source, uffd.HUGE_PAGE)
            uffd.advise(target, PLACE_BYTES, _MADV_DONTNEED)
        return seconds / (PLACE_BYTES / 1e9)
    finally:
        uffd.release(source, uffd.HUGE_PAGE)


def _memmove_s_per_gb() -> float:
    """Without userfaultfd a segment is copied into ordinary memory."""
    source, target = _Buffer(SEGMENT_SIZE, huge=True), uffd.reserve(PLACE_BYTES, align=uffd.HUGE_PAGE)
    try:
        start = time.perf_counter()
        for at in range(0, PLACE_BYTES, SEGMENT_SIZE):
            libc.memmove(target + at, source.address, SEGMENT_SIZE)
        return (time.perf_counter() - start) / (PLACE_BYTES / 1e9)
    finally:
        source.close()
        uffd.release(target, PLACE_BYTES)
