"""What the Framework hears: every change of a segment, in its order, and which plans were stopped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flexserve.core import PAGE_SIZE
from flexserve.errors import FlexServeError, SegmentNotAuthentic
from flexserve.flexmem.arena import Arena, Change, SegmentState
from flexserve.flexmem.loader import Loader
from flexserve.flexmem.uffd import Userfaultfd
from flexserve.framework.effects import Priority
from flexserve.framework.order import Range
from flexserve.framework.tables import SEGMENT, SegmentTrigger, after
from flexserve.framework.tables import SegmentState as Known

from .helpers import FakeSource, Image, close, eventually, holds, indices, place_all, regions, touch
from .test_arena import kernel_takes

PLACED, RECALLED, SPARED, PINNED, LOST, STOPPED = (
    SegmentTrigger.PLACED,
    SegmentTrigger.RECALLED,
    SegmentTrigger.SPARED,
    SegmentTrigger.PINNED,
    SegmentTrigger.LOST,
    SegmentTrigger.STOPPED,
)


@pytest.fixture
def arena(faults: Userfaultfd) -> Iterator[Arena]:
    made = Arena(regions(), faults, journal=True)
    yield made
    close(made, faults)


def test_a_journal_has_what_happened_in_its_order_and_each_once(arena: Arena, image: Image) -> None:
    place_all(arena, image)
    assert arena.take_journal() == [Change(PLACED, 1, 7)]
    assert arena.take_journal() == []
    arena.recall([2, 3])
    half = arena.claim(2, 1)
    assert half is not None
    arena.recall([2, 3, 4])
    assert arena.take_journal() == [
        Change(RECALLED, 2, 2),
        Change(SPARED, 2, 1),  # it is on its way
        Change(RECALLED, 3, 2),  # and of these one was gone already
    ]
    arena.place(half, image.address + half.offset)
    assert arena.take_journal() == [Change(PLACED, 2, 1)]


def test_lazy_segments_are_told_of_as_firm_again_or_lost(arena: Arena, image: Image) -> None:
    place_all(arena, image)
    arena.lazy([4, 5, 6, 7])
    kernel_takes(arena, 5, 1)
    arena.take_journal()
    assert arena.pin([4, 5, 6, 7]) == sum(arena.span(i).length for i in (4, 6, 7))
    assert arena.take_journal() == [Change(PINNED, 4, 1), Change(LOST, 5, 1), Change(PINNED, 6, 2)]
    assert arena.state(5) == SegmentState.ABSENT
    assert holds(arena, image, arena.span(6))


def test_an_arena_without_a_journal_remembers_nothing(faults: Userfaultfd, image: Image) -> None:
    arena = Arena(regions(), faults)
    place_all(arena, image)
    assert arena.take_journal() == []
    arena.close()


def test_locked_memory_can_be_handed_over_and_is_locked_again(faults: Userfaultfd, image: Image) -> None:
    arena = Arena(regions(), faults, journal=True, locked=True)
    place_all(arena, image)
    everything = indices(arena.regions)
    assert arena.lazy(everything) == 38 * PAGE_SIZE
    assert arena.pin(everything) == 38 * PAGE_SIZE
    assert arena.recall([6]) == arena.span(6).length
    assert all(holds(arena, image, arena.span(i)) for i in everything if i != 6)
    arena.close()


class Heard:
    """A listener that keeps what it hears, and what the journal had then."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.journal: list[Change] = []
        self.waited: list[int] = []
        self.error: FlexServeError | None = None

    def changed(self) -> None:
        self.journal += self.arena.take_journal()

    def computes_at(self, segment: int) -> None:
        self.waited.append(segment)

    def poisoned(self, error: FlexServeError) -> None:
        self.error = error


@pytest.fixture
def heard(arena: Arena) -> Heard:
    return Heard(arena)


@pytest.fixture
def source(image: Image) -> FakeSource:
    return FakeSource(image)


@pytest.fixture
def loader(arena: Arena, source: FakeSource, faults: Userfaultfd, heard: Heard) -> Iterator[Loader]:
    made = Loader(arena, source, faults, workers=1, listener=heard)
    yield made
    source.gate.set()
    made.close()


def placed(heard: Heard) -> list[int]:
    return [i for c in heard.journal if c.what == PLACED for i in range(c.first, c.first + c.count)]


def test_what_is_more_urgent_is_loaded_first_whenever_it_was_asked_for(
    loader: Loader, source: FakeSource, heard: Heard
) -> None:
    source.gate.clear()
    loader.extend([Range(1, 1)], Priority.REFILL)
    eventually(lambda: source.fetched)
    loader.extend([Range(4, 1)], Priority.REFILL)
    loader.extend([Range(5, 1)], Priority.REQUEST)
    loader.extend([Range(7, 1)], Priority.REQUEST)
    loader.extend([Range(2, 1)], Priority.ROWS)
    source.gate.set()
    eventually(lambda: len(placed(heard)) == 5)
    assert [s.first for s in source.fetched] == [1, 2, 5, 7, 4]
    assert sorted(placed(heard)) == [1, 2, 4, 5, 7]


def test_what_is_stopped_is_neither_placed_nor_under_way(
    loader: Loader, arena: Arena, source: FakeSource, heard: Heard
) -> None:
    source.gate.clear()
    loader.extend([Range(4, 4)], Priority.REQUEST)
    loader.extend([Range(1, 2)], Priority.REFILL)
    eventually(lambda: source.fetched)
    (begun,) = source.fetched
    loader.stop()
    source.gate.set()
    loader.wait()
    eventually(lambda: len(placed(heard)) == begun.count)
    heard.changed()
    state = dict.fromkeys(range(1, 8), Known.ABSENT) | dict.fromkeys((4, 5, 6, 7, 1, 2), Known.LOADING)
    for change in heard.journal:
        for index in range(change.first, change.first + change.count):
            state[index] = after(SEGMENT, state[index], change.what)
    there = range(begun.first, begun.first + begun.count)
    assert state == {i: Known.RESIDENT if i in there else Known.ABSENT for i in state}
    assert arena.segments_in(SegmentState.RESIDENT) == list(there)


def test_whoever_decides_hears_where_compute_waits_and_of_the_page_that_came(
    loader: Loader, arena: Arena, heard: Heard
) -> None:
    touch(arena.base + arena.span(6).offset)
    eventually(lambda: heard.waited and placed(heard))
    assert heard.waited == [6]
    assert placed(heard) == [6]


def test_a_segment_that_is_not_authentic_is_told_of(loader: Loader, source: FakeSource, heard: Heard) -> None:
    source.errors[5] = SegmentNotAuthentic("by the test")
    loader.extend([Range(4, 4)], Priority.REQUEST)
    eventually(lambda: heard.error)
    assert heard.error is source.errors[5]
