"""The soak: a short one without violations, and that each kind of violation would be seen."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from flexserve.bench import soak
from flexserve.bench.sides import SealedWorld
from flexserve.bench.soak import SoakOptions, Tally, _Client, _Storm
from flexserve.core import Finished, FinishReason, Request, Timings
from flexserve.engine.fake import FakeEngine, Script
from flexserve.errors import Busy, EngineFailure
from flexserve.worlds.fake import FakeWorld, write_fake_model

from ..schemas import validate

WEIGHTS = 8 << 20


def test_a_short_one_breaks_nothing_and_keeps_its_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(soak, "PAUSE_S", (0.0, 0.01))
    said: list[str] = []
    result = soak.run(SoakOptions(0.03, "tiny-llama", directory=tmp_path / "bench"), said.append)
    validate("bench-soak", result)
    assert result["violation_list"] == []
    assert result["violations"] == 0
    assert result["compared_tokens"] > 0
    assert result["recalled_bytes"] > 0
    assert str(result["seed"]) in "\n".join(said)
    assert not [path for path in (tmp_path / "bench").iterdir() if path.is_dir()]  # no session is left behind


def finished(ids: list[int], reason: FinishReason = FinishReason.LENGTH, reused: int = 0) -> Finished:
    return Finished("", tuple(ids), reason, Timings(cached_prompt_tokens=reused))


def client(stormy: object, tally: Tally, calm: object = None) -> _Client:
    worlds = [cast(SealedWorld, world) for world in (stormy, calm)]
    return _Client(0, worlds[0], worlds[1], tally, random.Random(0), 512, time.monotonic() + 3600)


@pytest.mark.parametrize(
    ("answer", "expected", "compared", "recomputed", "violations"),
    [
        (finished([1, 2]), finished([1, 2]), 2, 0, 0),
        (finished([1, 3]), finished([1, 2]), 0, 0, 1),
        (finished([1]), finished([1, 2]), 1, 0, 1),  # too short
        (finished([1, 3], reused=0), finished([1, 2], reused=9), 0, 1, 0),
        (finished([1], FinishReason.CANCELLED), finished([1, 2]), 1, 0, 0),
        (finished([3], FinishReason.CANCELLED), finished([1, 2]), 0, 0, 1),
        (finished([], FinishReason.CANCELLED), finished([1, 2]), 0, 0, 0),
    ],
)
def test_answers_are_compared_as_far_as_they_go(
    answer: Finished, expected: Finished, compared: int, recomputed: int, violations: int
) -> None:
    tally = Tally()
    client(None, tally)._compare(answer, expected, 2)
    assert (tally.compared_tokens, tally.recomputed_answers, tally.violations) == (
        compared,
        recomputed,
        violations,
    )


class World:
    """As much of a `SealedWorld` as a client or a storm needs, over the fake world."""

    def __init__(self, world: FakeWorld) -> None:
        self.world = world
        self.model = SimpleNamespace(weight_bytes=WEIGHTS)

    def request(self, ids: list[int], output: int) -> Request:
        return Request(f"r{id(object())}", "m", prompt="hello", max_tokens=output)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., World]]:
    made: list[FakeWorld] = []

    def world(*scripts: Script) -> World:
        fake = FakeWorld(FakeEngine({"hello": scripts[0]} if scripts else {}))
        fake.start()
        fake.register(write_fake_model(tmp_path, "m", weight_bytes=WEIGHTS))
        made.append(fake)
        return World(fake)

    yield world
    for fake in made:
        fake.close()


def test_errors_that_a_full_budget_may_cause_are_counted_and_others_are_violations(
    make: Callable[..., World],
) -> None:
    for error, violations in ((Busy("too many"), 0), (EngineFailure("broken"), 1)):
        tally, world = Tally(), make(Script("", error))
        assert client(world, tally)._ask(cast(SealedWorld, world), world.request([], 4), None) is None
        assert (dict(tally.errors), tally.violations) == ({error.code: 1}, violations)


def test_the_undisturbed_world_may_end_with_no_error_at_all(make: Callable[..., World]) -> None:
    tally, calm = Tally(), make(Script("", Busy("too many")))
    assert client(make(), tally, calm)._ask(cast(SealedWorld, calm), calm.request([], 4), None) is None
    assert tally.violations == 1


def storm(world: World, tally: Tally) -> _Storm:
    return _Storm(cast(SealedWorld, world), tally, random.Random(0), time.monotonic() + 3600)


def test_the_storm_recalls_offers_and_moves_the_budget(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    tally, world = Tally(), make()
    one = storm(world, tally)
    for _ in range(60):
        list(world.world.generate(world.request([], 4)))
        one.turn()
    assert min(tally.recalls, tally.offers, tally.budget_changes, tally.recalled_bytes) > 0
    assert tally.violations == 0


def test_holding_more_than_the_budget_is_a_violation(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    tally, world = Tally(), make()
    monkeypatch.setattr(soak, "SETTLE_S", 0.0)
    list(world.world.generate(world.request([], 4)))
    monkeypatch.setattr(soak, "SLACK_BYTES", 0)
    storm(world, tally)._check_budget()
    assert tally.violations == 0
    monkeypatch.setattr(world.world, "_shrink", lambda _nbytes: 0)  # as if nothing could go
    world.world.budget(soft_bytes=1 << 20)
    storm(world, tally)._check_budget()
    assert tally.shown == [f"{WEIGHTS} bytes are held, and the budget is {1 << 20}"]


def test_weights_that_stay_after_everything_was_recalled_are_a_violation(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    tally, world = Tally(), make()
    list(world.world.generate(world.request([], 4)))
    assert soak._at_rest(cast(SealedWorld, world), tally) == 0
    assert tally.violations == 0
    list(world.world.generate(world.request([], 4)))
    world.world.budget(soft_bytes=1 << 30)
    list(world.world.generate(world.request([], 4)))
    monkeypatch.setattr(world.world, "_shrink", lambda _nbytes: 0)
    assert soak._at_rest(cast(SealedWorld, world), tally) == WEIGHTS
    assert tally.shown == [f"{WEIGHTS} bytes of weights stay after everything was recalled"]


def test_a_bug_in_a_thread_and_a_thread_that_is_stuck_are_violations(monkeypatch: pytest.MonkeyPatch) -> None:
    class Buggy(soak._Worker):
        def turn(self) -> None:
            self.end = 0.0
            raise KeyError("nobody expected this")

    class Stuck(soak._Worker):
        def turn(self) -> None:
            self.got_on = -1e9
            self.end = 0.0
            over.wait()

    over = threading.Event()
    tally, far = Tally(), time.monotonic() + 3600
    soak._watch(
        [Stuck("one", tally, far), Buggy("other", tally, far)], tally, lambda _text: None, time.monotonic()
    )
    over.set()
    assert sorted(tally.shown) == ["one got no event for 180 s", "other: KeyError: 'nobody expected this'"]


def test_only_so_many_violations_are_told() -> None:
    tally = Tally()
    for number in range(50):
        tally.violation(str(number))
    assert (tally.violations, len(tally.shown)) == (50, soak.MOST_SHOWN)
