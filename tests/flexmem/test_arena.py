"""The arena's states against what the kernel says is really in memory."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexserve.core import PAGE_SIZE
from flexserve.errors import SegmentNotAuthentic
from flexserve.flexmem import uffd
from flexserve.flexmem.arena import Arena, SegmentState, Span
from flexserve.flexmem.uffd import MADV_DONTNEED, Userfaultfd
from flexserve.framework.order import Range

from .helpers import Image, Toucher, eventually, holds, indices, place_all, regions, states, touch


def smaps(arena: Arena, field: str) -> int:
    """Bytes of one field of /proc/self/smaps in the mappings that make up the arena."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = arena.base <= int(match[1], 16) < arena.base + arena.length
        elif inside and line.startswith(field + ":"):
            total += int(line.split()[1]) << 10
    return total


def kernel_takes(arena: Arena, index: int, *pages: int) -> None:
    """What the kernel does to a lazy segment when memory is short."""
    assert arena.state(index) == SegmentState.LAZY
    for number in pages:
        uffd.advise(arena.base + arena.span(index).offset + number * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)


def page_tables() -> int:
    """Bytes of this process's page tables."""
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmPTE"))
    return int(line.split()[1]) << 10


def frees_page_tables() -> bool:
    """Whether this kernel frees page tables when it frees the last page behind them."""
    length = 64 << 20
    address = uffd.reserve(length)
    uffd.advise(address, length, uffd.MADV_NOHUGEPAGE)
    uffd.advise(address, length, uffd.MADV_POPULATE_WRITE)
    tables = page_tables()
    uffd.advise(address, length, MADV_DONTNEED)
    freed = tables - page_tables()
    uffd.release(address, length)
    return freed > 0


def serve(arena: Arena, faults: Userfaultfd, image: Image) -> None:
    """One round of a fault handler: load what threads wait for."""
    eventually(lambda: _serve_once(arena, faults, image))


def _serve_once(arena: Arena, faults: Userfaultfd, image: Image) -> int:
    served = 0
    for address in faults.faults():
        span = arena.claim_fault(address - arena.base)
        if span is not None:
            arena.place(span, image.address + span.offset)
            served += 1
    return served


# Geometry


@given(
    st.tuples(st.integers(1, 8), st.integers(1, 200_000)),
    st.tuples(st.integers(1, 8), st.integers(1, 200_000)),
    st.integers(0, 5),
)
def test_every_image_byte_is_in_the_segment_whose_span_holds_it(
    embed: tuple[int, int], body: tuple[int, int], gap: int
) -> None:
    parts = regions((embed[0] * PAGE_SIZE, embed[1]), (body[0] * PAGE_SIZE, body[1]), gap * PAGE_SIZE)
    arena = Arena(parts, None)
    try:
        owner: dict[int, int] = {}
        for index in indices(parts):
            span = arena.span(index)
            assert span.length > 0
            assert span.offset % PAGE_SIZE == span.length % PAGE_SIZE == 0
            for offset in range(span.offset, span.offset + span.length, PAGE_SIZE):
                assert offset not in owner
                owner[offset] = index
        for offset in range(0, arena.length, PAGE_SIZE):
            assert arena.segment_at(offset) == arena.segment_at(offset + PAGE_SIZE - 1) == owner.get(offset)
        assert arena.segment_at(arena.length) is None
        assert arena.length == max(owner) + PAGE_SIZE
    finally:
        arena.close()


def test_a_span_of_several_segments_is_their_union_and_stays_in_its_region(arena: Arena) -> None:
    embed, body = arena.regions
    whole = arena.span(embed.first_segment, embed.segment_count)
    assert (whole.offset, whole.length) == (0, 9 * PAGE_SIZE)
    whole = arena.span(body.first_segment, body.segment_count)
    assert (whole.offset, whole.length) == (16 * PAGE_SIZE, 29 * PAGE_SIZE)
    for first, count in ((0, 1), (embed.first_segment, 4), (3, 2), (7, 2), (8, 1)):
        with pytest.raises(IndexError):
            arena.span(first, count)


# Claiming and placing


def test_a_new_arena_holds_nothing(arena: Arena) -> None:
    assert states(arena) == {SegmentState.ABSENT}
    assert arena.resident_pages() == 0
    assert arena.bytes_in(SegmentState.ABSENT) == 38 * PAGE_SIZE


def test_a_claim_takes_a_run_of_absent_segments_of_one_region(arena: Arena) -> None:
    span = arena.claim(2, 10)
    assert span is not None
    assert (span.first, span.count) == (2, 2)  # the region ends
    assert arena.claim(2, 1) is None
    one = arena.claim(1, 10)
    assert one is not None
    assert (one.first, one.count) == (1, 1)  # the next is claimed
    limited = arena.claim(4, 2)
    assert limited is not None
    assert (limited.first, limited.count) == (4, 2)
    assert [arena.state(i) for i in range(1, 8)] == [1, 1, 1, 1, 1, 0, 0]


def test_placed_segments_have_their_content_and_are_counted(arena: Arena, image: Image) -> None:
    span = arena.claim(4, 2)
    assert span is not None
    arena.place(span, image.address + span.offset)
    assert holds(arena, image, span)
    assert arena.resident_pages() == span.length // PAGE_SIZE
    assert arena.bytes_in(SegmentState.RESIDENT) == span.length == arena.counters.placed_bytes


def test_the_last_segment_counts_with_its_own_length(arena: Arena, image: Image) -> None:
    for last, pages in ((3, 1), (7, 5)):
        span = arena.claim(last, 1)
        assert span is not None
        arena.place(span, image.address + span.offset)
        assert arena.bytes_in(SegmentState.RESIDENT) == pages * PAGE_SIZE
        assert arena.recall([last]) == pages * PAGE_SIZE


# Faults


def test_a_touched_segment_is_claimed_as_a_whole_and_once(
    arena: Arena, faults: Userfaultfd, image: Image
) -> None:
    first, second = arena.span(4).offset + PAGE_SIZE, arena.span(4).offset + 5 * PAGE_SIZE
    threads = [Toucher(arena.base + first), Toucher(arena.base + second)]
    spans: list[Span | None] = []

    def both() -> bool:
        spans.extend(arena.claim_fault(a - arena.base) for a in faults.faults())
        return len(spans) == 2

    eventually(both)
    (span,) = [s for s in spans if s is not None]
    assert (span.first, span.count) == (4, 1)
    arena.place(span, image.address + span.offset)
    assert [t.result() for t in threads] == [image[first : first + 1], image[second : second + 1]]


@pytest.mark.parametrize(
    ("touched", "absent", "planned", "claimed"),
    [
        (0, (0, 1), (0, 1), (0, 2)),
        (1, (0, 1), (0, 1), (0, 2)),
        (1, (0, 1), (1,), (1, 1)),
        (1, (1,), (0, 1), (1, 1)),
        (2, (1, 2), (1, 2), (2, 1)),
        (4, (3, 4), (3, 4), (4, 1)),
    ],
)
def test_a_touched_segment_is_claimed_with_the_other_one_of_its_huge_page_if_that_is_planned(
    faults: Userfaultfd,
    touched: int,
    absent: tuple[int, ...],
    planned: tuple[int, ...],
    claimed: tuple[int, int],
) -> None:
    """The last of five segments is half of a huge page by itself, and shorter."""
    mib = 1 << 20
    arena = Arena(regions((16 << 10, 64 << 10), (mib, 5 * mib - 5)), faults)
    image = Image(arena.length)
    place_all(arena, image)
    body = arena.regions[1].first_segment
    arena.recall(body + i for i in absent)
    toucher = Toucher(arena.base + arena.span(body + touched).offset)
    spans: list[Span] = []

    def claimed_one() -> bool:
        plan = [Range(body + i, 1) for i in planned]
        found = (arena.claim_fault(a - arena.base, plan) for a in faults.faults())
        spans.extend(span for span in found if span is not None)
        return bool(spans)

    eventually(claimed_one)
    (span,) = spans
    assert (span.first - body, span.count) == claimed
    arena.place(span, image.address + span.offset)
    toucher.result()
    arena.close()


def test_a_recall_leaves_no_page_table_where_a_huge_page_would_have_to_be_split(faults: Userfaultfd) -> None:
    mib = 1 << 20
    arena = Arena(regions((16 << 10, 64 << 10), (mib, 64 * mib)), faults)
    image = Image(arena.length)
    place_all(arena, image)  # by copies: page by page
    tables = page_tables()
    arena.recall(indices(arena.regions))
    freed = tables - page_tables()
    arena.close()
    if not frees_page_tables():
        pytest.skip(
            "this kernel keeps empty page tables (it frees them from Linux 6.14 on, with CONFIG_PT_RECLAIM)"
        )
    assert freed >= 24 * PAGE_SIZE, freed


def test_the_gap_between_the_regions_reads_as_zeros(arena: Arena, faults: Userfaultfd, image: Image) -> None:
    thread = Toucher(arena.base + 10 * PAGE_SIZE)
    eventually(lambda: _serve_once(arena, faults, image) or not thread.waiting)
    assert thread.result() == b"\0"
    assert states(arena) == {SegmentState.ABSENT}


def test_a_fault_that_was_answered_meanwhile_loads_nothing(arena: Arena, image: Image) -> None:
    place_all(arena, image)
    assert arena.claim_fault(arena.span(5).offset) is None
    assert arena.state(5) == SegmentState.RESIDENT
    assert arena.counters.lost_segments == 0


# Recall


def test_a_recall_empties_the_segments_and_counts_their_bytes(arena: Arena, image: Image) -> None:
    place_all(arena, image)
    freed = arena.recall([2, 3, 6])
    assert freed == (4 + 1 + 8) * PAGE_SIZE == arena.counters.recalled_bytes
    assert arena.bytes_in(SegmentState.ABSENT) == freed
    assert arena.resident_pages() == 38 - 13
    for index in (1, 4, 5, 7):
        assert holds(arena, image, arena.span(index))
    assert arena.recall([2, 3, 6]) == 0


def test_a_recall_leaves_segments_that_are_on_their_way(arena: Arena, image: Image) -> None:
    span = arena.claim(5, 1)
    assert span is not None
    assert arena.recall([4, 5, 6]) == 0
    arena.place(span, image.address + span.offset)
    assert holds(arena, image, span)


def test_pages_are_zeroed_before_the_kernel_gets_them(
    arena: Arena, faults: Userfaultfd, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_all(arena, image)
    arena.lazy([6])
    kernel_takes(arena, 6, 0, 3)
    seen: list[bytes] = []
    release = uffd.release

    def look_first(address: int, length: int) -> None:
        for at, present in enumerate(uffd.resident_pages(address, length)):
            if present:
                seen.append(touch(address + at * PAGE_SIZE, PAGE_SIZE))
        release(address, length)

    monkeypatch.setattr(uffd, "release", look_first)
    assert arena.recall(indices(arena.regions)) == 36 * PAGE_SIZE  # two were the kernel's already
    assert len(seen) == 36
    place_all(arena, image)
    half = arena.recall([4]) and arena.claim(4, 1)
    assert half
    faults.copy(arena.base + half.offset, image.address, 3 * PAGE_SIZE)  # a loader that ended half way
    seen.clear()
    arena.close()
    assert len(seen) == 38 - 8 + 3
    assert not any(map(any, seen))


def test_a_recall_of_lazy_segments_takes_no_new_memory(
    arena: Arena, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_all(arena, image)
    arena.lazy([6])
    kernel_takes(arena, 6, 1, 2)
    present: list[int] = []
    release = uffd.release

    def look_first(address: int, length: int) -> None:
        present.append(sum(uffd.resident_pages(address, length)))
        release(address, length)

    monkeypatch.setattr(uffd, "release", look_first)
    arena.recall([6])
    assert present == [6]


# Lazy and pin


def test_lazy_pages_are_the_kernels_to_take_until_they_are_pinned(faults: Userfaultfd) -> None:
    mib = 1 << 20
    arena = Arena(regions((16 << 10, 64 << 10), (mib, 3 * mib)), faults)
    image = Image(arena.length)
    place_all(arena, image)
    assert smaps(arena, "LazyFree") == 0
    body = indices(arena.regions[1:])
    assert arena.lazy(body) == 3 * mib == arena.counters.lazy_bytes
    # The kernel marks pages in batches and counts the last few later.
    assert 2 * mib < smaps(arena, "LazyFree") <= 3 * mib
    assert arena.bytes_in(SegmentState.LAZY) == 3 * mib
    assert arena.lazy(body) == 0
    assert arena.pin(body) == 3 * mib
    assert smaps(arena, "LazyFree") == 0
    assert states(arena) == {SegmentState.RESIDENT}
    for index in body:
        assert holds(arena, image, arena.span(index))
    arena.close()


class Contended:
    """The arena's lock, which tells when somebody has to wait for it."""

    def __init__(self, arena: Arena) -> None:
        self._lock = arena._lock
        self.waited = threading.Event()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.waited.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@pytest.mark.parametrize("index", [4, 6], ids=["the first of its region", "another"])
def test_a_segment_that_is_placed_while_others_are_handed_over_or_pinned_is_not_cut_in_two(
    arena: Arena, image: Image, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    place_all(arena, image)
    arena.recall([index])
    lock = Contended(arena)
    monkeypatch.setattr(arena, "_lock", lock)
    others = [i for i in indices(arena.regions) if i != index]
    for hand_over_or_pin in (arena.lazy, arena.pin):
        claimed = arena.claim(index, 1)
        assert claimed is not None
        worker = threading.Thread(target=arena.place, args=(claimed, image.address + claimed.offset))
        span = arena.span

        def placed_now(
            first: int, count: int = 1, *, span: Callable[[int, int], Span] = span, worker: Thread = worker
        ) -> Span:
            """Between two looks at the segment's state, a worker places it, or has to wait."""
            assert count > 0
            if first == index and worker.ident is None:
                lock.waited.clear()
                worker.start()
                eventually(lambda: lock.waited.is_set() or not worker.is_alive())
            return span(first, count)

        monkeypatch.setattr(arena, "span", placed_now)
        done = hand_over_or_pin([*others, index])
        worker.join()
        monkeypatch.setattr(arena, "span", span)
        placed_in_time = arena.state(index) == SegmentState.LAZY  # before its turn to be handed over
        assert done == sum(span(i).length for i in others + [index] * placed_in_time)
        assert arena.recall([index]) == span(index).length


@pytest.mark.parametrize("taken", [(0,), (7,), (3, 4), tuple(range(8))])
def test_pin_gives_up_what_the_kernel_took_pages_of(
    arena: Arena, image: Image, taken: tuple[int, ...]
) -> None:
    place_all(arena, image)
    arena.lazy([4, 5])
    kernel_takes(arena, 4, *taken)
    assert arena.pin([4, 5]) == 8 * PAGE_SIZE
    assert (arena.state(4), arena.state(5)) == (SegmentState.ABSENT, SegmentState.RESIDENT)
    assert arena.counters.lost_segments == 1
    assert smaps(arena, "LazyFree") == 0
    # Nothing of an absent segment may stay behind: no recall would find it.
    assert not any(uffd.resident_pages(arena.base + arena.span(4).offset, arena.span(4).length))


@pytest.mark.parametrize("state", ["lazy", "resident"])
def test_a_single_page_that_is_gone_is_refilled_when_it_is_touched(
    arena: Arena, faults: Userfaultfd, image: Image, state: str
) -> None:
    place_all(arena, image)
    if state == "lazy":
        arena.lazy([6])
    offset = arena.span(6).offset
    uffd.advise(arena.base + offset + 2 * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
    thread = Toucher(arena.base + offset, arena.span(6).length)
    serve(arena, faults, image)
    assert thread.result() == image[offset : offset + arena.span(6).length]
    assert arena.state(6) == SegmentState.RESIDENT
    assert arena.counters.lost_segments == 1
    assert smaps(arena, "LazyFree") == 0  # firm again, all of it


def test_without_userfaultfd_nothing_is_handed_to_the_kernel() -> None:
    """A page it took would read as zeros."""
    arena = Arena(regions(), None)
    image = Image(arena.length)
    place_all(arena, image)
    assert arena.lazy(indices(arena.regions)) == 0
    assert states(arena) == {SegmentState.RESIDENT}
    assert smaps(arena, "LazyFree") == 0
    assert holds(arena, image, arena.span(4, 4))
    assert arena.recall([1, 5]) == 12 * PAGE_SIZE
    arena.close()


# Poison and the end


def test_poison_releases_threads_now_and_later_with_zeros(arena: Arena, faults: Userfaultfd) -> None:
    error = SegmentNotAuthentic("segment 5")
    before = Toucher(arena.base + arena.span(5).offset)
    eventually(lambda: [arena.claim_fault(a - arena.base) for a in faults.faults()])
    arena.poison(error)
    arena.poison(SegmentNotAuthentic("another one"))
    assert before.result() == b"\0"
    assert arena.poisoned is error
    assert arena.claim(1, 1) is None
    later = Toucher(arena.base + arena.span(7).offset)
    eventually(lambda: [arena.claim_fault(a - arena.base) for a in faults.faults()])
    assert later.result() == b"\0"


def test_poison_makes_threads_fault_again_whose_fault_nobody_answers(
    arena: Arena, faults: Userfaultfd
) -> None:
    thread = Toucher(arena.base + arena.span(5).offset)
    eventually(lambda: list(faults.faults()))  # read by a handler that died
    arena.poison(SegmentNotAuthentic("x"))
    eventually(lambda: [arena.claim_fault(a - arena.base) for a in faults.faults()])
    assert thread.result() == b"\0"


def test_what_poison_zeroed_can_be_recalled(arena: Arena) -> None:
    arena.claim(5, 2)
    arena.poison(SegmentNotAuthentic("x"))
    assert arena.resident_pages() == 16
    assert arena.recall([5, 6]) == 16 * PAGE_SIZE
    assert arena.resident_pages() == 0


def test_closing_twice_unmaps_once(arena: Arena, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    place_all(arena, image)
    arena.close()
    monkeypatch.setattr(uffd, "release", lambda *_: pytest.fail("unmapped somebody else's memory"))
    arena.close()
    assert arena.recall(indices(arena.regions)) == 0
    assert arena.bytes_in(SegmentState.RESIDENT) == 0


def test_the_arena_is_left_out_of_children_and_dumps(arena: Arena) -> None:
    flags = ""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-", line):
            inside = int(match[1], 16) == arena.base
        elif inside and line.startswith("VmFlags:"):
            flags = line
    assert {"dc", "dd", "um"} <= set(flags.split())
