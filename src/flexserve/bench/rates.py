"""What this machine's parts do alone: placing, first touch, reading from the page cache. Bytes per second, wall time.

Each measures what the loader does (1 MiB segments, huge pages as staging) through the same calls, but nothing of
the loader itself: these are the limits it is compared with. Reading past the page cache and decrypting:
worlds/linux/rates.py, which calibrates a server with them.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from ..core import SEGMENT_SIZE
from ..flexmem import uffd
from ..flexmem.uffd import UffdDeniedError, Userfaultfd, libc
from ..worlds.linux.rates import Buffer, copy_s_per_gb, read_bytes_per_s
from . import machine
from .memory import first_touch_s_per_gb

DEPTHS = (1, 2, 4, 8)
READ_BYTES = 256 << 20  # for one rate
DECRYPT_S = 0.3
PLACE_BYTES = 256 << 20


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


def cached_bytes_per_s(path: Path) -> float:
    """Read a file that is in the page cache, in one thread."""
    read_bytes_per_s(path, READ_BYTES, depth=1, direct=False)
    rate = read_bytes_per_s(path, READ_BYTES, depth=1, direct=False)
    machine.evict(path)
    return rate


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
        return Placing(
            copy_s_per_gb(faults, target, PLACE_BYTES), _move_s_per_gb(faults, target), huge, small
        )
    finally:
        faults.close()
        uffd.release(target, PLACE_BYTES)


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
            uffd.advise(target, PLACE_BYTES, uffd.MADV_DONTNEED)
        return seconds / (PLACE_BYTES / 1e9)
    finally:
        uffd.release(source, uffd.HUGE_PAGE)


def _memmove_s_per_gb() -> float:
    """Without userfaultfd a segment is copied into ordinary memory."""
    source, target = Buffer(SEGMENT_SIZE, huge=True), uffd.reserve(PLACE_BYTES, align=uffd.HUGE_PAGE)
    try:
        start = time.perf_counter()
        for at in range(0, PLACE_BYTES, SEGMENT_SIZE):
            libc.memmove(target + at, source.address, SEGMENT_SIZE)
        return (time.perf_counter() - start) / (PLACE_BYTES / 1e9)
    finally:
        source.close()
        uffd.release(target, PLACE_BYTES)
