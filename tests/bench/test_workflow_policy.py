"""Policies of whole models: what stays, what goes, and that the budget holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexserve.bench.workflow_policy import TIMER_S, WHOLE_MODELS, WholeModels, refusal

SIZES = {"a": 4, "b": 3, "c": 2, "d": 1}


def _use(policy: WholeModels, model: str, now: float) -> list[str]:
    """What goes before and after an answer."""
    return policy.needed(model, now) + policy.answered(model, now)


def test_load_per_request_keeps_nothing() -> None:
    policy = WholeModels("load_per_request", SIZES, 4)
    assert _use(policy, "a", 0.0) == ["a"]
    assert policy.resident == ()


def test_the_least_recently_used_model_goes_when_another_needs_its_room() -> None:
    policy = WholeModels("lru", SIZES, 6)
    assert [_use(policy, model, now) for now, model in enumerate("bcdb")] == [[], [], [], []]
    assert list(policy.resident) == ["c", "d", "b"]
    assert _use(policy, "a", 5.0) == ["c", "d", "b"]
    assert list(policy.resident) == ["a"]


def test_no_more_goes_than_has_to() -> None:
    policy = WholeModels("lru", SIZES, 6)
    for now, model in enumerate("bcd"):
        _use(policy, model, now)
    assert policy.needed("c", 9.0) == []
    assert policy.everything() == ["b", "d", "c"]
    assert policy.held_bytes == 0


def test_the_timer_drops_what_was_not_used_for_five_minutes_and_nothing_else() -> None:
    policy, lru = (WholeModels(name, SIZES, 6) for name in ("timer", "lru"))
    for one in (policy, lru):
        _use(one, "b", 0.0)
        _use(one, "c", 100.0)
    assert policy.expired(TIMER_S - 1) == []
    assert policy.expired(TIMER_S) == ["b"]
    assert policy.resident == ("c",)
    assert lru.expired(10 * TIMER_S) == []
    assert _use(policy, "a", TIMER_S + 50.0) == []
    assert _use(policy, "b", TIMER_S + 60.0) == ["c", "a"]


def test_what_does_not_fit_is_said() -> None:
    assert "all models together" in refusal("keep_all", SIZES, 9)
    assert refusal("keep_all", SIZES, 10) == ""
    for policy in WHOLE_MODELS:
        assert "model a" in refusal(policy, SIZES, 3)


@given(
    st.sampled_from(("load_per_request", "timer", "lru")),
    st.integers(4, 12),
    st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 400)), max_size=40),
)
def test_the_budget_holds_and_whoever_is_needed_is_there(
    name: str, budget: int, uses: list[tuple[str, float]]
) -> None:
    policy = WholeModels(name, SIZES, budget)
    there: set[str] = set()
    now = 0.0
    for model, pause in uses:
        now += pause
        there -= set(policy.expired(now))
        gone = policy.needed(model, now)
        assert set(gone) <= there - {model}
        there = (there - set(gone)) | {model}
        assert there == set(policy.resident)
        assert policy.held_bytes == sum(SIZES[one] for one in there) <= budget
        there -= set(policy.answered(model, now))


def test_a_policy_that_is_refused_cannot_be_made() -> None:
    with pytest.raises(AssertionError):
        WholeModels("keep_all", SIZES, 4)
