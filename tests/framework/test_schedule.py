"""Which request is next: cheap switches first, within bounds on waiting that hold whatever comes."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from flexserve.framework import schedule
from flexserve.framework.effects import StartRequest
from flexserve.framework.settings import Settings
from flexserve.framework.weights import Part

from .executor import Answer, Executor

MIB = 1 << 20
SETTINGS = Settings(overtake_limit=4, overtake_s=30.0)
QUICK = hypothesis_settings(deadline=None, max_examples=60)
BODY = (Part(0, 100, MIB, 100 * MIB),)


@dataclass
class One:
    """A request in a queue."""

    model: str
    arrived: float
    number: int
    priority: int = 0
    overtaken: int = 0
    blocked: bool = False
    over: int = 0  # by requests that came later, while it could start: counted here, on our own
    late: bool = False  # somebody overtook it after it had waited for `overtake_s`


class Queue:
    """One slot, many models: the model that was used last costs nothing."""

    def __init__(self, settings: Settings, costs: dict[str, float]) -> None:
        self.settings, self.costs = settings, costs
        self.waiting: list[One] = []
        self.last = ""
        self.switches = 0

    def cost_s(self, model: str) -> float:
        return 0.0 if model == self.last else self.costs[model]

    def start(self, now: float) -> One | None:
        able = [one for one in self.waiting if not one.blocked]
        chosen = schedule.choose(able, now, self.cost_s, self.settings)
        if chosen is None:
            assert not able
            return None
        schedule.count_overtaken(able, chosen)
        for one in able:
            if one.number < chosen.number:
                one.over += 1
                one.late = one.late or now - one.arrived >= self.settings.overtake_s
        self.waiting.remove(chosen)
        self.switches += chosen.model != self.last
        self.last = chosen.model
        assert chosen.over <= self.settings.overtake_limit, "overtaken too often"
        assert not chosen.late, "overtaken after it had waited long enough"
        return chosen


ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from("abcd"),
        st.floats(0, 20),
        st.integers(-2, 2),
        st.sampled_from([False] * 4 + [True]),
        st.integers(0, 3),
    ),
    max_size=60,
)


@QUICK
@given(
    arrivals=ARRIVALS,
    limit=st.integers(0, 5),
    patience=st.floats(0, 60),
    costs=st.tuples(*[st.floats(0, 50)] * 4),
)
def test_the_bounds_on_waiting_hold_whatever_comes(
    arrivals: list[tuple[str, float, int, bool, int]],
    limit: int,
    patience: float,
    costs: tuple[float, ...],
) -> None:
    settings = replace(SETTINGS, overtake_limit=limit, overtake_s=patience)
    queue = Queue(settings, dict(zip("abcd", costs, strict=True)))
    now, started = 0.0, 0
    for number, (model, after, priority, blocked, starts) in enumerate(arrivals):
        now += after
        queue.waiting.append(One(model, now, number, priority, blocked=blocked))
        for _ in range(starts):
            started += queue.start(now) is not None
            now += 1.0
        if starts == 2:  # those that waited for their own conversation may start now
            for one in queue.waiting:
                one.blocked = False
    for one in queue.waiting:
        one.blocked = False
    while queue.waiting:
        queue.start(now)
        now += 1.0
        started += 1
    assert started == len(arrivals)


def simulate(requests: int, *, seed: int, settings: Settings) -> Queue:
    """So many requests, in bursts, sometimes more than can be answered; returns the queue at its end."""
    chance = random.Random(seed)
    queue = Queue(settings, {f"m{n}": chance.uniform(0.1, 5.0) for n in range(20)})
    names = list(queue.costs)
    now = free = 0.0
    for number in range(requests):
        now += chance.expovariate(0.1) if chance.random() < 0.12 else 0.0
        while queue.waiting and (free <= now or len(queue.waiting) > 64):
            free = max(free, queue.waiting[0].arrived)
            assert queue.start(free) is not None
            free += chance.expovariate(1.0)
        model = names[min(int(chance.expovariate(0.4)), len(names) - 1)]
        queue.waiting.append(One(model, now, number, priority=chance.choice((-1, 0, 0, 0, 1))))
    return queue


def test_ten_thousand_simulated_requests_never_wait_beyond_the_bound() -> None:
    fair = simulate(10_000, seed=1, settings=replace(SETTINGS, overtake_limit=0))
    done = simulate(10_000, seed=1, settings=Settings())
    assert done.switches < fair.switches * 0.95  # it is worth it


@pytest.mark.slow
def test_a_million_simulated_requests_never_wait_beyond_the_bound() -> None:
    simulate(1_000_000, seed=2, settings=Settings())


def one_after_the_other(made: Executor, names: list[str]) -> list[str]:
    """Answer whatever runs until nothing waits; the order in which these were started."""
    for _ in range(1000):
        made.drain()
        running = [n for n, a in made.answers.items() if a.state == "computing"]
        for name in running:
            made.now += 0.1
            made.step(name)
            made.finish(name)
        if all(a.ended for a in made.answers.values()):
            break
    assert all(made.answers[n].ended == "finished" for n in names)
    return [n for n in made.started if n in names]


def framework(settings: Settings, models: str = "ab") -> Executor:
    made = Executor(settings)
    for name in models:
        made.register(name, BODY, 1000)
    return made


def test_requests_of_the_resident_model_go_first_until_another_has_been_overtaken_often_enough() -> None:
    made = framework(Settings(overtake_limit=3, budget_bytes=150 * MIB, lazy=False, prefetch=False))
    made.ask("r0", Answer("a", "a/r0", 50))
    made.drain()
    names = ["b1", *(f"a{n}" for n in range(6))]
    for name in names:
        made.ask(name, Answer(name[0], f"{name[0]}/{name}", 50))
    assert one_after_the_other(made, names) == ["a0", "a1", "a2", "b1", "a3", "a4", "a5"]


def test_whoever_waited_longer_than_its_switch_costs_goes_first() -> None:
    made = framework(Settings(budget_bytes=150 * MIB, lazy=False, prefetch=False))
    made.ask("r0", Answer("a", "a/r0", 50))
    made.drain()
    made.ask("b1", Answer("b", "b/b1", 50))  # 100 MiB at 1 GiB/s: 0.1 s, which counts twice
    made.now += 0.5
    made.ask("a1", Answer("a", "a/a1", 50))
    assert one_after_the_other(made, ["b1", "a1"]) == ["b1", "a1"]


def test_a_higher_priority_goes_first_within_the_bound() -> None:
    made = framework(Settings(overtake_limit=2, lazy=False), "a")
    made.ask("r0", Answer("a", "a/r0", 50))
    made.drain()
    names = ["low", "n1", "h1", "h2"]
    for name, priority in zip(names, (-1, 0, 1, 1), strict=True):
        made.ask(name, Answer("a", f"a/{name}", 50, priority=priority))
    assert one_after_the_other(made, names) == ["h1", "h2", "low", "n1"]


def test_a_pinned_models_weights_go_last() -> None:
    made = framework(Settings(pinned=("a",), budget_bytes=250 * MIB, lazy=False, saves=False), "abc")
    for number, name in enumerate("abbbc"):  # a is the least invoked
        made.ask(f"r{number}", Answer(name, f"{name}/s", 50))
        one_after_the_other(made, [f"r{number}"])
    assert made.images["a"].resident == 100 * MIB
    assert made.images["b"].resident < 100 * MIB


@QUICK
@given(data=st.data(), slots=st.integers(1, 3))
def test_the_framework_keeps_the_bound_too_and_ends_nothing_that_computes(
    data: st.DataObject, slots: int
) -> None:
    settings = Settings(
        overtake_limit=2, compute_slots=slots, budget_bytes=180 * MIB, lazy=False, queue_limit=100
    )
    made = framework(settings, "abc")
    numbers = itertools.count()
    arrived: list[str] = []
    for model in data.draw(st.lists(st.sampled_from("abc."), max_size=25)):
        if model != ".":
            name = f"{model}{next(numbers)}"
            arrived.append(name)
            made.ask(name, Answer(model, f"{model}/{name}", 20))
        else:
            made.drain()
            for name in [n for n, a in made.answers.items() if a.state == "computing"]:
                made.finish(name)
        made.now += 0.01
    order = one_after_the_other(made, arrived)  # all of them end as finished: nothing was killed
    for name in arrived:
        later = [n for n in order[: order.index(name)] if arrived.index(n) > arrived.index(name)]
        assert len(later) <= settings.overtake_limit
    starts = [d for _, _, ds in made.log for d in ds if isinstance(d.effect, StartRequest)]
    assert len(starts) == len(arrived)
