"""Any order of claims, placements, recalls, lazy hand-overs, losses and pins: states and kernel always agree."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flexserve.core import PAGE_SIZE
from flexserve.errors import SegmentNotAuthentic
from flexserve.flexmem import uffd
from flexserve.flexmem.arena import Arena, SegmentState, Span
from flexserve.flexmem.uffd import MADV_DONTNEED, Userfaultfd

from .helpers import Image, Toucher, close, eventually, holds, indices, regions

ABSENT, LOADING, RESIDENT, LAZY = SegmentState
PARTS = regions()
ALL = indices(PARTS)
SETS = st.lists(st.sampled_from(ALL), max_size=7, unique=True)


class ArenaMachine(RuleBasedStateMachine):
    """The model: a state for each segment, and the pages the kernel took from the lazy ones."""

    def __init__(self) -> None:
        super().__init__()
        self.faults = Userfaultfd()
        self.arena = Arena(PARTS, self.faults)
        self.image = Image(self.arena.length)
        self.state = dict.fromkeys(ALL, ABSENT)
        self.lost: dict[int, set[int]] = {}
        self.claims: list[Span] = []
        self.poisoned = False
        self.placed = self.recalled = self.handed = self.losses = 0

    def length(self, *segments: int) -> int:
        return sum(self.arena.span(i).length for i in segments)

    @rule(first=st.sampled_from(ALL), limit=st.integers(1, 5))
    def claim(self, first: int, limit: int) -> None:
        span = self.arena.claim(first, limit)
        if self.poisoned or self.state[first] != ABSENT:
            assert span is None
            return
        assert span is not None
        taken = range(first, first + span.count)
        assert 1 <= span.count <= limit
        assert all(self.state[i] == ABSENT for i in taken)
        region = next(r for r in PARTS if first < r.first_segment + r.segment_count)
        after = first + span.count
        assert (
            span.count == limit or after == region.first_segment + region.segment_count or self.state[after]
        )
        self.state.update(dict.fromkeys(taken, LOADING))
        self.claims.append(span)

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def place(self, data: st.DataObject) -> None:
        span = self.claims.pop(data.draw(st.integers(0, len(self.claims) - 1)))
        self.arena.place(span, self.image.address + span.offset)
        for index in range(span.first, span.first + span.count):
            self.state[index] = RESIDENT
            self.lost.pop(index, None)  # after a poisoning, pages may be lost from a claim
        self.placed += span.length

    @rule(segments=SETS)
    def recall(self, segments: list[int]) -> None:
        there = [i for i in segments if self.state[i] >= RESIDENT]
        gone = sum(len(self.lost.pop(i, ())) for i in there) * PAGE_SIZE
        assert self.arena.recall(segments) == self.length(*there) - gone
        self.recalled += self.length(*there)
        self.state.update(dict.fromkeys(there, ABSENT))

    @rule(segments=SETS)
    def lazy(self, segments: list[int]) -> None:
        there = [i for i in segments if self.state[i] == RESIDENT]
        assert self.arena.lazy(segments) == self.length(*there)
        self.handed += self.length(*there)
        self.state.update(dict.fromkeys(there, LAZY))

    @precondition(lambda self: LAZY in self.state.values())
    @rule(data=st.data())
    def the_kernel_takes_pages(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from([i for i in ALL if self.state[i] == LAZY]))
        span = self.arena.span(index)
        pages = data.draw(st.sets(st.integers(0, span.length // PAGE_SIZE - 1), min_size=1))
        for number in pages:
            uffd.advise(self.arena.base + span.offset + number * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
        self.lost.setdefault(index, set()).update(pages)

    @rule(segments=SETS)
    def pin(self, segments: list[int]) -> None:
        there = [i for i in segments if self.state[i] == LAZY]
        lost = [i for i in there if i in self.lost]
        assert self.arena.pin(segments) == self.length(*(i for i in there if i not in lost))
        for index in there:
            self.state[index] = ABSENT if index in lost else RESIDENT
        for index in lost:
            del self.lost[index]
        self.losses += len(lost)

    @rule(data=st.data(), index=st.sampled_from(ALL))
    def compute_touches_a_segment(self, data: st.DataObject, index: int) -> None:
        span = self.arena.span(index)
        at = span.offset + PAGE_SIZE * data.draw(st.integers(0, span.length // PAGE_SIZE - 1))
        missing = self.state[index] <= LOADING or (at - span.offset) // PAGE_SIZE in self.lost.get(index, ())
        if self.state[index] == LOADING and not self.poisoned:
            return  # waits for a placement, which is another rule
        thread = Toucher(self.arena.base + at)
        found: list[Span | None] = []

        def served() -> bool:
            found.extend(self.arena.claim_fault(a - self.arena.base) for a in self.faults.faults())
            return bool(found) or not thread.waiting

        eventually(served)
        if not missing and not self.poisoned:
            assert thread.result() == self.image[at : at + 1]
            return
        if self.poisoned:
            assert thread.result() in (b"\0", self.image[at : at + 1])  # whoever computed with it is told
            if index in self.lost:  # the page has zeros now
                self.lost[index].discard((at - span.offset) // PAGE_SIZE)
                self.lost = {i: pages for i, pages in self.lost.items() if pages}
            return
        (claimed,) = found
        assert claimed == span
        self.losses += index in self.lost
        self.lost.pop(index, None)
        self.arena.place(span, self.image.address + span.offset)
        self.placed += span.length
        self.state[index] = RESIDENT
        assert thread.result() == self.image[at : at + 1]

    @precondition(lambda self: not self.poisoned)
    @rule(now=st.sampled_from([False] * 9 + [True]))
    def poison(self, now: bool) -> None:
        if now:
            self.arena.poison(SegmentNotAuthentic("by the test"))
            self.poisoned = True
            for index in ALL:
                if self.state[index] == LOADING:
                    self.state[index] = RESIDENT

    @invariant()
    def states_are_as_expected(self) -> None:
        assert {i: self.arena.state(i) for i in ALL} == self.state
        for state in SegmentState:
            there = [i for i in ALL if self.state[i] == state]
            assert self.arena.segments_in(state) == there
            assert self.arena.bytes_in(state) == self.length(*there)
        counters = self.arena.counters
        assert counters.placed_bytes == self.placed
        assert counters.recalled_bytes == self.recalled
        assert counters.lazy_bytes == self.handed
        assert counters.lost_segments == self.losses

    @invariant()
    def the_kernel_agrees(self) -> None:
        if self.poisoned:
            return  # zeros may be anywhere
        for index in ALL:
            span = self.arena.span(index)
            present = uffd.resident_pages(self.arena.base + span.offset, span.length)
            if self.state[index] <= LOADING:
                assert not any(present)
            elif self.state[index] == LAZY:
                assert not any(present[page] for page in self.lost.get(index, ()))
            else:
                assert holds(self.arena, self.image, span)

    def teardown(self) -> None:
        close(self.arena, self.faults)
        self.faults.close()


def test_states_and_memory_agree_after_anything() -> None:
    run: Any = run_state_machine_as_test
    run(ArenaMachine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))
