"""Which request is next: the cost of switching models against the time a request has waited.

Requests of one model cost the same to start, and go by priority and arrival. A model that is not in memory costs
the time until its weights are there, less what computing the prompt hides of it. Bounds on waiting:

1. at most `overtake_limit` requests that arrived later start before one that could start;
2. none does once it has waited for `overtake_s`.

So whoever finds n requests before it starts as one of the next n + 1 + `overtake_limit`. A request whose session
another one uses cannot start, and is passed without being counted. Nothing that runs is stopped for another.

Pure functions of what waits. Does not know sessions, memory or how rates are measured (pace.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from .settings import Settings


class Waiting(Protocol):
    """A request in the queue."""

    model: str
    arrived: float
    number: int  # in the order of arrival
    priority: int
    overtaken: int  # by requests that arrived later


W = TypeVar("W", bound=Waiting)


def choose(waiting: Iterable[W], now: float, cost_s: Callable[[str], float], settings: Settings) -> W | None:
    """The next of those that could start; `cost_s`: of starting a request of this model."""
    due: W | None = None
    best: W | None = None
    best_key: tuple[int, float, int] | None = None
    costs: dict[str, float] = {}
    for one in waiting:
        if is_due(one, now, settings):
            if due is None or one.number < due.number:
                due = one
        elif due is None:
            cost = costs.get(one.model)
            if cost is None:
                cost = costs[one.model] = cost_s(one.model)
            # Whoever arrived earlier by more than what its switch costs goes first.
            key = (-one.priority, one.arrived + settings.switch_weight * cost, one.number)
            if best_key is None or key < best_key:
                best, best_key = one, key
    return due or best


def is_due(one: Waiting, now: float, settings: Settings) -> bool:
    """Whether nothing that arrived later may be started before this one."""
    return one.overtaken >= settings.overtake_limit or now - one.arrived >= settings.overtake_s


def count_overtaken(waiting: Iterable[W], chosen: W) -> None:
    """`chosen` starts: those of `waiting` (that could start too) that arrived before it were overtaken."""
    for one in waiting:
        if one.number < chosen.number:
            one.overtaken += 1
