"""Segments by the set: found, cut, moved and named like one by one, in a time that does not grow with the stretches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from flexserve.framework import events as ev
from flexserve.framework.machine import Framework
from flexserve.framework.order import Range, Ranges
from flexserve.framework.positions import NONE, Positions
from flexserve.framework.settings import Settings
from flexserve.framework.tables import SEGMENT, Impossible, SegmentState, SegmentTrigger
from flexserve.framework.weights import FEW, Ledger, Part, Weights

from .test_caching import weights as models

NO_DEADLINE = hypothesis_settings(deadline=None)  # the machine may be busy
STATES = {
    SegmentState.ABSENT: (),
    SegmentState.LOADING: (SegmentTrigger.LOAD,),
    SegmentState.RESIDENT: (SegmentTrigger.PLACED,),
    SegmentState.LAZY: (SegmentTrigger.PLACED, SegmentTrigger.HAND),
    SegmentState.CLAIMED: (SegmentTrigger.PLACED, SegmentTrigger.CLAIM),
}


@st.composite
def mixed(draw: st.DrawFn) -> Weights:
    """A model whose segments are in any states."""
    model = draw(models())
    kinds = draw(st.lists(st.sampled_from(list(STATES)), min_size=model.count, max_size=model.count))
    for state, triggers in STATES.items():
        for trigger in triggers:
            model.apply(trigger, chosen([n for n, kind in enumerate(kinds) if kind == state]))
    assert [model.state(n) for n in range(model.count)] == kinds
    return model


def chosen(numbers: list[int]) -> Positions:
    return Positions.of((n, n + 1) for n in numbers)


def one_by_one(positions: Positions) -> list[int]:
    return [n for start, end in positions for n in range(start, end)]


@NO_DEADLINE
@given(st.sets(st.integers(0, 60)), st.integers(0, 61), st.integers(0, 61))
def test_a_set_is_its_members(numbers: set[int], low: int, high: int) -> None:
    made = chosen(sorted(numbers))
    assert one_by_one(made) == sorted(numbers)
    assert bool(made) == bool(numbers)
    assert made.stretches() == len(list(made))
    assert made.count(low, high) == len([n for n in numbers if low <= n < high])
    assert one_by_one(made.before(high)) == sorted(n for n in numbers if n < high)
    assert one_by_one(made.from_(low)) == sorted(n for n in numbers if n >= low)


@NO_DEADLINE
@given(mixed(), st.data())
def test_bytes_are_cut_off_a_set_from_its_beginning_and_from_its_end(
    model: Weights, data: st.DataObject
) -> None:
    numbers = sorted(data.draw(st.sets(st.integers(0, model.count - 1))))
    sizes = [model.nbytes(n, n + 1) for n in numbers]
    assert model.bytes_of(chosen(numbers)) == sum(sizes)
    nbytes = data.draw(st.integers(0, model.size + 3))
    most = max(n for n in range(len(numbers) + 1) if sum(sizes[:n]) <= nbytes)
    assert one_by_one(model.first(chosen(numbers), nbytes)) == numbers[:most]
    fewest = max((n for n in range(len(numbers) + 1) if sum(sizes[n:]) >= nbytes), default=0)
    assert one_by_one(model.last(chosen(numbers), nbytes)) == numbers[fewest:]


@NO_DEADLINE
@given(mixed(), st.data())
def test_what_is_absent_and_what_may_be_taken_are_found_between_two_positions(
    model: Weights, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, model.count))
    end = data.draw(st.integers(start, model.count))
    absent = [n for n in range(start, end) if model.state(n) == SegmentState.ABSENT]
    there = [n for n in range(start, end) if model.state(n) in (SegmentState.RESIDENT, SegmentState.LAZY)]
    assert one_by_one(model.absent(start, end, model.size)) == absent
    assert model.absent_bytes(start, end) == sum(model.nbytes(n, n + 1) for n in absent)
    assert one_by_one(model.tail(start, end, model.size)) == there
    wanted = sorted(data.draw(st.sets(st.integers(0, model.count - 1))))
    for state in SegmentState:
        both = [n for n in wanted if model.state(n) == state]
        assert one_by_one(model.those(state, chosen(wanted))) == both


@NO_DEADLINE
@given(mixed(), st.sampled_from(list(SegmentTrigger)), st.data())
def test_a_step_of_a_set_is_that_of_each_of_them_or_none_at_all(
    model: Weights, trigger: SegmentTrigger, data: st.DataObject
) -> None:
    numbers = sorted(data.draw(st.sets(st.integers(0, model.count - 1))))
    before = [model.state(n) for n in range(model.count)]
    if any((before[n], trigger) not in SEGMENT for n in numbers):
        with pytest.raises(Impossible):
            model.apply(trigger, chosen(numbers))
        assert [model.state(n) for n in range(model.count)] == before
    else:
        after = [SEGMENT[state, trigger] if n in numbers else state for n, state in enumerate(before)]
        changed = [n for n in numbers if after[n] != before[n]]
        assert model.apply(trigger, chosen(numbers)) == sum(model.nbytes(n, n + 1) for n in changed)
        assert [model.state(n) for n in range(model.count)] == after
    model.check()


@NO_DEADLINE
@given(mixed(), st.data())
def test_positions_become_segment_numbers_and_positions_again(model: Weights, data: st.DataObject) -> None:
    numbers = sorted(data.draw(st.sets(st.integers(0, model.count - 1))))
    ranges = model.ranges(chosen(numbers))
    indices = [i for one in ranges for i in range(one.first, one.first + one.count)]
    assert sorted(model.position(i) for i in indices) == numbers
    assert one_by_one(model.positions(ranges)) == numbers
    shuffled = data.draw(st.permutations(tuple(ranges)))
    assert one_by_one(model.positions(shuffled)) == numbers
    for wrong in (Range(10_000, 1), Range(indices[0] if indices else 0, 0)):
        with pytest.raises(IndexError):
            model.positions([*ranges, wrong])


def test_very_many_ranges_are_made_when_somebody_looks_and_stay_what_they_were() -> None:
    model = Weights([Part(5, 4 * FEW, 10, 40 * FEW)], Ledger())
    every_second = chosen(list(range(0, 4 * FEW, 2)))
    many = model.ranges(every_second)
    model.apply(SegmentTrigger.LOAD, every_second)
    assert isinstance(many, Ranges)
    assert many == tuple(Range(5 + n, 1) for n in range(0, 4 * FEW, 2))
    assert len(many) == 2 * FEW
    assert hash(many) == hash(tuple(many))
    assert repr(many) == repr(tuple(many))
    assert isinstance(model.ranges(chosen([1, 3])), tuple)


def test_an_empty_set_takes_no_step() -> None:
    model = Weights([Part(0, 3, 10, 30)], Ledger())
    assert model.apply(SegmentTrigger.RECALLED, NONE) == 0
    assert model.positions(()) == NONE


def calls(work: Callable[[], object]) -> int:
    """How many Python functions it calls; what is done in C does not count."""
    count = 0

    def look(_frame: FrameType, what: str, _argument: object) -> None:
        nonlocal count
        count += what == "call"

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize(
    "event", [ev.PressureRecall(1, 1 << 40), ev.PressureRecall(1, 700), ev.Offer(1 << 40)]
)
def test_a_decision_does_no_more_steps_where_the_segments_are_scattered(event: ev.Event) -> None:
    def steps(there: tuple[Range, ...]) -> int:
        framework = Framework(Settings(budget_bytes=1 << 40, cap_bytes=1 << 40, floor_bytes=0))
        framework.handle(0.0, ev.ModelRegistered("a", (Part(0, 4000, 1, 4000),), 1, 100))
        framework.handle(0.0, ev.SegmentsChanged("a", SegmentTrigger.PLACED, there))
        return calls(lambda: framework.handle(1.0, event))

    assert steps(tuple(Range(n, 1) for n in range(0, 4000, 4))) <= 2 * steps((Range(0, 1000),))
