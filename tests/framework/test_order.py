"""The order in which segments are loaded: what compute needs first comes first, and nothing twice in a plan."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from flexserve.framework.order import Range, join, load_order, without

UNITS = st.integers(1, 400)


def indices(order: list[Range]) -> list[int]:
    return [i for r in order for i in range(r.first, r.first + r.count)]


@given(st.sets(st.integers(0, 300)))
def test_joined_ranges_are_the_same_indices_and_no_two_touch(numbers: set[int]) -> None:
    ranges = join(sorted(numbers))
    assert indices(ranges) == sorted(numbers)
    assert all(r.count > 0 for r in ranges)
    assert all(a.first + a.count < b.first for a, b in itertools.pairwise(ranges))


@given(st.data(), UNITS, UNITS, st.booleans())
def test_rows_come_first_then_the_body_then_a_tied_embedding(
    data: st.DataObject, embed_units: int, body_units: int, tied: bool
) -> None:
    rows = sorted(data.draw(st.sets(st.integers(0, embed_units - 1))))
    embed, body = Range(1, embed_units), Range(1 + embed_units, body_units)
    order = load_order(embed, body, rows, tied_output=tied)
    expected = [1 + r for r in rows] + list(range(body.first, body.first + body_units))
    if tied:
        expected += range(1, 1 + embed_units)
    assert indices(order) == expected


@given(st.data(), UNITS)
def test_an_untied_embedding_is_never_loaded_beyond_the_prompts_rows(data: st.DataObject, units: int) -> None:
    rows = sorted(data.draw(st.sets(st.integers(0, units - 1))))
    order = indices(load_order(Range(5, units), Range(5 + units, 3), rows, tied_output=False))
    assert {i for i in order if i < 5 + units} == {5 + r for r in rows}


@given(st.data(), UNITS, UNITS, st.booleans())
def test_everything_a_tied_model_needs_is_in_the_plan(
    data: st.DataObject, embed_units: int, body_units: int, tied: bool
) -> None:
    rows = sorted(data.draw(st.sets(st.integers(0, embed_units - 1))))
    order = indices(load_order(Range(0, embed_units), Range(embed_units, body_units), rows, tied_output=tied))
    needed = set(range(embed_units, embed_units + body_units)) | set(rows)
    assert needed <= set(order)
    assert len(order) - len(set(order)) == (len(rows) if tied else 0)


def test_a_prompt_without_rows_loads_the_body_only() -> None:
    assert load_order(Range(0, 9), Range(9, 4), [], tied_output=False) == [Range(9, 4)]


@given(st.integers(0, 50), UNITS, st.data())
def test_what_is_left_out_of_the_body_and_what_is_loaded_are_all_of_it(
    first: int, count: int, data: st.DataObject
) -> None:
    body = Range(first, count)
    holes = join(sorted(data.draw(st.sets(st.integers(first, first + count - 1)))))
    left = without(body, holes)
    assert sorted(indices(left) + indices(holes)) == indices([body])
    assert indices(left) == sorted(indices(left))
    assert all(r.count > 0 for r in left)
    assert load_order(Range(0, 1), body, [], tied_output=False, left_out=holes) == left
