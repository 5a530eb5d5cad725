"""How much memory to take back or to give, from what the machine says about its memory. Pure.

The normal side says how much; which bytes go is the Framework's decision. Knows no file, no clock and no world.

Three rules, whose proofs are in tests/normal/test_policy.py:

- a recall takes what is missing up to the high watermark, and never more than is held above the floor;
- an offer is made after calm, and only of what would leave the high watermark free if the secure world used all it
  may hold: so no offer is the cause of a recall, unless others need memory meanwhile;
- an offer that answers in progress ask for comes sooner, and under the same condition;
- what the secure world may still take never reaches more than a step below the low watermark: it cannot fill memory
  faster than somebody looks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from ..core import Budget
from ..errors import Usage

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Thresholds; docs/memory.md has them as a table. Raises `Usage` when they contradict each other."""

    low_bytes: int  # of available memory: below it, recall
    high_bytes: int  # up to which is recalled, and above which is offered
    step_bytes: int = 128 * MIB  # of a recall because somebody waits for memory, and of an offer
    calm_s: float = 30.0  # without any need before the first offer
    wanted_calm_s: float = 2.0  # the same, where an answer asks for memory
    most_calm_s: float = 600.0  # after offers that had to be taken back again and again
    deadline_s: float = 10.0  # of a recall, for saving what has to be saved
    period_s: float = 1.0  # between two looks when nothing wakes the manager
    stall_s: float = 0.15  # of stall_window_s in which some task waits for memory: that wakes it (PSI)
    stall_window_s: float = 2.0  # a multiple of 2: what the kernel allows everybody

    def __post_init__(self) -> None:
        if not 0 < 2 * self.step_bytes <= self.low_bytes < self.high_bytes:
            raise Usage(
                f"the memory manager's watermarks contradict each other: step {self.step_bytes}, "
                f"low {self.low_bytes}, high {self.high_bytes} bytes",
                hint="low must be at least two steps, and high above low",
            )
        times = (
            self.wanted_calm_s,
            self.calm_s,
            self.deadline_s,
            self.period_s,
            self.stall_s,
            self.stall_window_s,
        )
        if (
            min(times) <= 0
            or not self.wanted_calm_s <= self.calm_s <= self.most_calm_s
            or self.stall_s >= self.stall_window_s
        ):
            raise Usage("the memory manager's times contradict each other")

    @classmethod
    def of_machine(cls, total_bytes: int) -> Settings:
        """The defaults: watermarks at 5 and 10 % of memory, at least 256 and 512 MiB; less on machines below 2 GiB."""
        step = min(128 * MIB, max(MIB, total_bytes // 16))
        return cls(max(2 * step, total_bytes // 20), max(4 * step, total_bytes // 10), step)


@dataclass(frozen=True)
class Readings:
    """What the machine and the world say at one moment. Sizes in bytes."""

    now_s: float
    available_bytes: int  # for new memory, without anybody having to wait; what is lazy counts
    free_bytes: int  # used by nobody, not even as page cache
    lazy_bytes: int  # of what is held, what the kernel may take already
    budget: Budget
    stalled: bool = False  # somebody waited for memory (PSI) since the last readings
    throttled: bool = False  # our control group went over its memory.high since then


class Why(StrEnum):
    """The reason of an action, as the log says it."""

    LOW = "available memory is below the low watermark"
    STALLED = "programs wait for memory"
    THROTTLED = "the control group is over its memory.high"
    ROOM = "more could be taken than is available"
    CALM = "memory is available again"
    WANTED = "an answer could use it"


@dataclass(frozen=True)
class Recall:
    """Take back this much."""

    nbytes: int
    why: Why


@dataclass(frozen=True)
class Offer:
    """Give this much."""

    nbytes: int
    why: Why = Why.CALM


@dataclass(frozen=True)
class Limit:
    """Lower the soft budget to this much, which is no less than what is held."""

    soft_bytes: int
    why: Why = Why.ROOM


Action = Recall | Offer | Limit


@dataclass(frozen=True)
class State:
    """What is remembered from one decision to the next."""

    calm_since_s: float
    patience_s: float  # of calm before an offer
    offered: bool = False  # since the last recall

    @classmethod
    def at(cls, now_s: float, settings: Settings) -> State:
        """At the start."""
        return cls(now_s, settings.calm_s)


def decide(settings: Settings, state: State, r: Readings) -> tuple[State, Action | None]:
    """The next action, if any."""
    why = _need(settings, r)
    if why is not None:
        # An offer that has to be taken back was one too early: wait longer the next time.
        patience = min(2 * state.patience_s, settings.most_calm_s) if state.offered else state.patience_s
        state = State(r.now_s, patience)
        missing = max(settings.high_bytes - r.available_bytes, 0)
        if why is not Why.LOW:
            missing = max(missing, settings.step_bytes)
        # What the kernel may take already is available already: taking it back makes no difference.
        nbytes = min(missing + r.lazy_bytes, r.budget.held_bytes - r.budget.floor_bytes)
        if nbytes > 0:
            return state, Recall(nbytes, why)
    limit = _limit(settings, r)
    if limit is not None or why is not None:
        return state, limit
    calm_s = r.now_s - state.calm_since_s
    offer = None
    if calm_s >= state.patience_s * settings.wanted_calm_s / settings.calm_s:
        offer = _wanted(settings, r)
    if offer is None and calm_s >= state.patience_s:
        offer = _offer(settings, r)
    return (state, None) if offer is None else (replace(state, offered=True), offer)


def _need(settings: Settings, r: Readings) -> Why | None:
    """Why memory is wanted back."""
    if r.throttled:
        return Why.THROTTLED
    # With much memory free, whoever waits does so at a limit of his own: ours would not help him.
    if r.stalled and r.free_bytes < settings.high_bytes:
        return Why.STALLED
    return Why.LOW if r.available_bytes < settings.low_bytes else None


def _firm_bytes(r: Readings) -> int:
    """Of what is held, what is not counted as available."""
    return max(r.budget.held_bytes - r.lazy_bytes, 0)


def _limit(settings: Settings, r: Readings) -> Limit | None:
    """A lower soft budget where filling it would take too much; a step below what is safe, so that not every page
    somebody else takes moves it."""
    safe = _firm_bytes(r) + max(r.available_bytes - settings.low_bytes, 0)
    if r.budget.soft_bytes <= safe + settings.step_bytes:
        return None
    lowest = max(r.budget.floor_bytes, r.budget.held_bytes)
    soft = max(safe - settings.step_bytes, lowest)
    return Limit(soft) if soft < r.budget.soft_bytes else None


def _offer(settings: Settings, r: Readings) -> Offer | None:
    """A step, or what is missing to the hard cap; None when less than that would leave the high watermark free."""
    nbytes = min(settings.step_bytes, r.budget.hard_bytes - r.budget.soft_bytes)
    return Offer(nbytes) if 0 < nbytes <= _room(settings, r) else None


def _wanted(settings: Settings, r: Readings) -> Offer | None:
    """What answers in progress ask for at once, or as much of it as there is room for; None where that is less than a
    step: they would only ask again."""
    most = min(r.budget.wanted_bytes, r.budget.hard_bytes - r.budget.soft_bytes)
    nbytes = min(most, _room(settings, r))
    return (
        Offer(nbytes, Why.WANTED)
        if nbytes > 0 and (nbytes == most or nbytes >= settings.step_bytes)
        else None
    )


def _room(settings: Settings, r: Readings) -> int:
    """What may be offered so that the high watermark stays free even if the whole budget is used."""
    return r.available_bytes - settings.high_bytes - (r.budget.soft_bytes - _firm_bytes(r))
