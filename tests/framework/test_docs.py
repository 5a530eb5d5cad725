"""docs/framework.md is what the tables say, and the tables have no dead ends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import pytest

from flexserve.framework.docs import PARTS, diagram, refreshed
from flexserve.framework.tables import (
    MODEL,
    REQUEST,
    SEGMENT,
    SESSION,
    Impossible,
    SegmentState,
    SegmentTrigger,
    after,
)

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "framework.md"
TABLES = [SEGMENT, SESSION, REQUEST, MODEL]


def test_the_document_is_what_the_tables_say() -> None:
    text = DOCUMENT.read_text()
    assert text == refreshed(text), "run `python -m flexserve.framework.docs docs`"
    assert {name for name in PARTS if f"<!-- made: {name} -->" in text} == set(PARTS)


def test_a_changed_table_would_be_noticed() -> None:
    changed = dict(SEGMENT) | {(SegmentState.ABSENT, SegmentTrigger.HAND): SegmentState.LAZY}
    assert diagram(changed) != diagram(SEGMENT)


@pytest.mark.parametrize("table", TABLES, ids=["segment", "session", "request", "model"])
def test_every_state_can_be_reached_and_left(table: Mapping[tuple[Enum, Enum], Enum]) -> None:
    states = set(type(next(iter(table.values()))))
    start = next(iter(table))[0]

    def reachable(steps: Mapping[Enum, set[Enum]]) -> set[Enum]:
        seen, new = {start}, [start]
        while new:
            for state in steps.get(new.pop(), set()) - seen:
                seen.add(state)
                new.append(state)
        return seen

    forward: dict[Enum, set[Enum]] = {}
    backward: dict[Enum, set[Enum]] = {}
    for (state, _), then in table.items():
        forward.setdefault(state, set()).add(then)
        backward.setdefault(then, set()).add(state)
    assert reachable(forward) == states
    assert reachable(backward) == states  # from anywhere back to the beginning


def test_what_is_in_no_table_is_impossible() -> None:
    with pytest.raises(Impossible, match="ABSENT: RECALLED"):
        after(SEGMENT, SegmentState.ABSENT, SegmentTrigger.RECALLED)


def test_the_tests_that_the_document_names_exist() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests" / "framework").glob("*.py"))
    for name in re.findall(r"`(test_\w+)`", DOCUMENT.read_text()):
        assert f"def {name}(" in sources, name
