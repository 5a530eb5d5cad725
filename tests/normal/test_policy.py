"""How much to recall or to offer: for any readings, and in a closed loop with a world that takes all it may."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexserve.core import Budget
from flexserve.errors import Usage
from flexserve.normal.policy import (
    MIB,
    Limit,
    Offer,
    Readings,
    Recall,
    Settings,
    State,
    Why,
    decide,
)

SETTINGS = Settings(512 * MIB, 1024 * MIB, 128 * MIB)
SIZES = st.integers(0, 1 << 34)


def budgets() -> st.SearchStrategy[Budget]:
    """Any that a world may report: held may be above the soft budget while a recall is under way."""

    def make(three: list[int], held: int, wanted: int) -> Budget:
        floor, soft, hard = sorted(three)
        return Budget(soft, hard, floor, held, wanted)

    return st.builds(make, st.lists(SIZES, min_size=3, max_size=3), SIZES, st.just(0) | SIZES)


def readings(now_s: float = 1000.0) -> st.SearchStrategy[Readings]:
    return st.builds(Readings, st.just(now_s), SIZES, SIZES, SIZES, budgets(), st.booleans(), st.booleans())


def states() -> st.SearchStrategy[State]:
    return st.builds(
        State, st.floats(0, 1000), st.floats(SETTINGS.calm_s, SETTINGS.most_calm_s), st.booleans()
    )


@given(states(), readings())
def test_a_recall_takes_what_is_missing_and_nothing_below_the_floor(state: State, r: Readings) -> None:
    _, action = decide(SETTINGS, state, r)
    if not isinstance(action, Recall):
        return
    assert 0 < action.nbytes <= r.budget.held_bytes - r.budget.floor_bytes
    missing = max(SETTINGS.high_bytes - r.available_bytes, 0)
    assert action.nbytes <= max(missing, SETTINGS.step_bytes) + r.lazy_bytes
    if action.why is Why.LOW:
        assert action.nbytes <= missing + r.lazy_bytes


@given(states(), readings())
def test_an_offer_leaves_the_high_watermark_free_however_much_of_the_budget_is_used(
    state: State, r: Readings
) -> None:
    _, action = decide(SETTINGS, state, r)
    if not isinstance(action, Offer):
        return
    firm = max(r.budget.held_bytes - r.lazy_bytes, 0)
    still_to_take = r.budget.soft_bytes + action.nbytes - firm
    assert still_to_take <= r.available_bytes - SETTINGS.high_bytes
    assert 0 < action.nbytes <= r.budget.hard_bytes - r.budget.soft_bytes
    assert not (r.stalled and r.free_bytes < SETTINGS.high_bytes)
    assert not r.throttled


@given(states(), readings())
def test_what_answers_ask_for_is_all_that_is_offered_before_the_calm_time(state: State, r: Readings) -> None:
    _, action = decide(SETTINGS, state, r)
    if not isinstance(action, Offer) or action.why is not Why.WANTED:
        assert not isinstance(action, Offer) or r.now_s - state.calm_since_s >= state.patience_s
        return
    assert action.nbytes <= r.budget.wanted_bytes
    assert r.now_s - state.calm_since_s >= SETTINGS.wanted_calm_s


def test_an_answer_that_asks_gets_memory_after_two_seconds_of_calm_and_without_asking_after_thirty() -> None:
    r = Readings(2.0, 4 << 30, 4 << 30, 0, Budget(64 * MIB, 2 << 30, 0, 64 * MIB, wanted_bytes=300 * MIB))
    state = State.at(0.0, SETTINGS)
    assert decide(SETTINGS, state, r)[1] == Offer(300 * MIB, Why.WANTED)
    assert decide(SETTINGS, state, dataclasses.replace(r, now_s=1.0))[1] is None
    some = dataclasses.replace(r, available_bytes=SETTINGS.high_bytes + 200 * MIB)
    assert decide(SETTINGS, state, some)[1] == Offer(200 * MIB, Why.WANTED)
    little = dataclasses.replace(r, available_bytes=SETTINGS.high_bytes + 100 * MIB)
    assert decide(SETTINGS, state, little)[1] is None
    capped = dataclasses.replace(r.budget, hard_bytes=128 * MIB)
    assert decide(SETTINGS, state, dataclasses.replace(r, budget=capped))[1] == Offer(64 * MIB, Why.WANTED)
    nothing = dataclasses.replace(r, budget=dataclasses.replace(r.budget, wanted_bytes=0))
    assert decide(SETTINGS, state, nothing)[1] is None
    assert decide(SETTINGS, state, dataclasses.replace(nothing, now_s=30.0))[1] == Offer(128 * MIB, Why.CALM)


def test_after_an_offer_that_was_taken_back_an_answer_that_asks_waits_longer_too() -> None:
    budget = Budget(64 * MIB, 2 << 30, 0, 64 * MIB, wanted_bytes=300 * MIB)
    short = Readings(2.0, 100 * MIB, 100 * MIB, 0, budget)
    state, _ = decide(SETTINGS, State(0.0, SETTINGS.calm_s, offered=True), short)
    plenty = dataclasses.replace(short, available_bytes=4 << 30, now_s=4.5)
    assert decide(SETTINGS, state, plenty)[1] is None
    assert decide(SETTINGS, state, dataclasses.replace(plenty, now_s=6.0))[1] == Offer(300 * MIB, Why.WANTED)


@given(states(), readings())
def test_a_limit_never_takes_what_is_held_and_never_raises_the_budget(state: State, r: Readings) -> None:
    _, action = decide(SETTINGS, state, r)
    if isinstance(action, Limit):
        assert max(r.budget.held_bytes, r.budget.floor_bytes) <= action.soft_bytes < r.budget.soft_bytes


@given(states(), readings())
def test_when_nothing_needs_memory_nothing_is_taken(state: State, r: Readings) -> None:
    calm = dataclasses.replace(
        r, available_bytes=r.available_bytes + SETTINGS.low_bytes, stalled=False, throttled=False
    )
    _, action = decide(SETTINGS, state, calm)
    assert not isinstance(action, Recall)


@dataclasses.dataclass
class Loop:
    """A machine on which others use a given amount, and a world that fills its budget as it likes."""

    total: int
    others: int
    budget: Budget
    now_s: float = 0.0
    stalled: bool = False

    def __post_init__(self) -> None:
        self.state = State.at(0.0, SETTINGS)
        self.actions: list[tuple[float, object]] = []

    @property
    def available(self) -> int:
        return max(self.total - self.others - self.budget.held_bytes, 0)

    def step(self, fill: float) -> None:
        """The world takes `fill` of what it still may, as far as there is memory; then the manager looks."""
        b = self.budget
        room = min(max(b.soft_bytes - b.held_bytes, 0), self.available)
        b = self.budget = dataclasses.replace(b, held_bytes=b.held_bytes + int(fill * room))
        self.now_s += SETTINGS.period_s
        self.state, action = decide(
            SETTINGS, self.state, Readings(self.now_s, self.available, self.available, 0, b, self.stalled)
        )
        if action is not None:
            self.actions.append((self.now_s, action))
        match action:
            case Recall(nbytes):
                held = b.held_bytes - nbytes
                self.budget = dataclasses.replace(b, held_bytes=held, soft_bytes=max(held, b.floor_bytes))
            case Offer(nbytes):
                self.budget = dataclasses.replace(b, soft_bytes=min(b.soft_bytes + nbytes, b.hard_bytes))
            case Limit(soft):
                self.budget = dataclasses.replace(b, soft_bytes=soft)


def loops() -> st.SearchStrategy[Loop]:
    def make(total: int, others: int, three: list[int], held: float) -> Loop:
        floor, soft, hard = sorted(three)
        free = max(total - others, 0)
        return Loop(total, others, Budget(soft, hard, floor, int(held * min(soft, free))))

    sizes = st.integers(0, 8 << 30)
    return st.builds(make, st.just(8 << 30), sizes, st.lists(sizes, min_size=3, max_size=3), st.floats(0, 1))


@given(loops(), st.lists(st.floats(0, 1), min_size=120, max_size=120))
def test_with_steady_neighbours_no_offer_is_followed_by_a_recall(loop: Loop, fills: list[float]) -> None:
    for fill in fills:
        loop.step(fill)
    kinds = [type(action) for _, action in loop.actions]
    if Offer in kinds:
        assert Recall not in kinds[kinds.index(Offer) :]
        assert loop.available >= SETTINGS.high_bytes
    # It comes to rest: a few corrections at the start, then offers up to the cap or the watermark.
    assert sum(kind is not Offer for kind in kinds) <= 12


@given(loops(), st.floats(0, 1))
def test_the_world_cannot_fill_memory_between_two_looks(loop: Loop, fill: float) -> None:
    loop.budget = dataclasses.replace(loop.budget, floor_bytes=0)
    loop.step(0.0)
    loop.step(0.0)
    before = loop.available
    loop.step(fill)
    lowest = SETTINGS.low_bytes - 2 * SETTINGS.step_bytes
    assert loop.available >= min(before, lowest)


def test_offers_that_have_to_be_taken_back_come_ever_later() -> None:
    loop = Loop(8 << 30, 6 << 30, Budget(512 * MIB, 4 << 30, 0, 512 * MIB))
    for _ in range(3000):
        offered = bool(loop.actions) and isinstance(loop.actions[-1][1], Offer)
        # Somebody waits whenever more was offered, as with a page cache that counts as available.
        loop.stalled = offered
        loop.total = (6 << 30) + 512 * MIB + loop.budget.held_bytes + (1 << 30 if not offered else 0)
        loop.step(1.0)
    offers = [at for at, action in loop.actions if isinstance(action, Offer)]
    gaps = [b - a for a, b in pairwise(offers)]
    assert gaps == sorted(gaps)
    assert SETTINGS.calm_s <= gaps[0]
    assert gaps[-1] >= SETTINGS.most_calm_s


def test_waiting_at_a_limit_of_their_own_costs_nothing_here() -> None:
    budget = Budget(1 << 30, 2 << 30, 0, 1 << 30)
    stalled = Readings(0.0, 4 << 30, 4 << 30, 0, budget, stalled=True)
    assert decide(SETTINGS, State.at(0.0, SETTINGS), stalled)[1] is None
    full = dataclasses.replace(stalled, free_bytes=100 * MIB)
    assert decide(SETTINGS, State.at(0.0, SETTINGS), full)[1] == Recall(SETTINGS.step_bytes, Why.STALLED)


def test_going_over_memory_high_is_answered_with_a_recall() -> None:
    r = Readings(0.0, 4 << 30, 4 << 30, 0, Budget(1 << 30, 2 << 30, 0, 1 << 30), throttled=True)
    assert decide(SETTINGS, State.at(0.0, SETTINGS), r)[1] == Recall(SETTINGS.step_bytes, Why.THROTTLED)


def test_when_all_that_is_held_is_lazy_already_the_budget_still_falls() -> None:
    r = Readings(0.0, 100 * MIB, 100 * MIB, 64 * MIB, Budget(1 << 30, 2 << 30, 64 * MIB, 64 * MIB))
    assert decide(SETTINGS, State.at(0.0, SETTINGS), r)[1] == Limit(64 * MIB)


@given(st.integers(1, 1 << 44))
def test_every_machine_has_watermarks(total: int) -> None:
    s = Settings.of_machine(total)
    assert 2 * s.step_bytes <= s.low_bytes < s.high_bytes


@pytest.mark.parametrize(
    "wrong",
    [
        {"low_bytes": 2048 * MIB},
        {"step_bytes": 0},
        {"step_bytes": 512 * MIB},
        {"calm_s": 0.0},
        {"most_calm_s": 1.0},
        {"stall_s": 2.0},
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(Usage, match="contradict"):
        dataclasses.replace(SETTINGS, **wrong)
