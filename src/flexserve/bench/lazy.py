"""Handing memory to the kernel lazily: how fast it goes, and that the kernel takes it. On an arena of this process."""

from __future__ import annotations

import time

from ..core import SEGMENT_SIZE
from ..flexmem import uffd
from ..flexmem.arena import Arena
from ..flexmem.uffd import Userfaultfd
from ..sealed.format import Region, RegionKind

ARENA_BYTES = 1 << 30


def hand_over_bytes_per_s() -> float:
    """Placed segments, handed over in one go. Raises `UffdDeniedError` where there is no userfaultfd."""
    count = ARENA_BYTES // SEGMENT_SIZE
    region = Region(RegionKind.BODY, SEGMENT_SIZE, 0, ARENA_BYTES, 0, 0, count)
    faults = Userfaultfd()
    arena = Arena((region,), faults)
    source = uffd.reserve(SEGMENT_SIZE, align=uffd.HUGE_PAGE)
    try:
        for index in range(count):
            span = arena.claim(index, 1)
            assert span is not None
            arena.place(span, source)
        begin = time.perf_counter()
        handed = arena.lazy(range(count))
        return handed / (time.perf_counter() - begin)
    finally:
        uffd.release(source, SEGMENT_SIZE)
        arena.close()
        faults.close()
