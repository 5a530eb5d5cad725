"""Kill -9 at any moment: every client gets one clear error or the whole right answer, and the world recovers."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexserve.core import Finished, Request, Sampling, Token
from flexserve.errors import FlexServeError, WorldCrashed
from flexserve.worlds.base import Generation, ModelSource
from flexserve.worlds.linux import LinuxWorld

from ..sealed_fixtures import TINY
from ..world_fixtures import Device, linux_world

MODELS = ("one", "two")
TOKENS = 60


@pytest.fixture(scope="module")
def sources(device: Device) -> list[ModelSource]:
    return [device.add_kit(name, TINY)[0] for name in MODELS]


@pytest.fixture
def world(device: Device, sources: list[ModelSource]) -> Iterator[LinuxWorld]:
    with linux_world(device) as started:
        for source in sources:
            started.register(source)
        yield started


class Client(threading.Thread):
    """Asks once and keeps what it gets."""

    def __init__(self, world: LinuxWorld, number: str, model: str) -> None:
        super().__init__(daemon=True)
        self._world = world
        self._request = Request(
            id=number,
            model=model,
            token_ids=(1, 2, 3),
            max_tokens=TOKENS,
            ignore_eos=True,
            sampling=Sampling(temperature=0),
        )
        self.tokens: list[int] = []
        self.end: Finished | BaseException | None = None
        self.generation: Generation | None = None
        self.start()

    def run(self) -> None:
        try:
            self.generation = self._world.generate(self._request)
            for event in self.generation:
                if isinstance(event, Token):
                    self.tokens.append(event.id)
                else:
                    assert self.end is None
                    self.end = event
        except BaseException as error:
            assert self.end is None
            self.end = error

    def outcome(self) -> tuple[int, ...] | None:
        """The whole answer; None after the one clear error."""
        self.join(60)
        assert not self.is_alive(), "a client waits for ever"
        if isinstance(self.end, Finished):
            assert tuple(self.tokens) == self.end.token_ids
            return self.end.token_ids
        assert isinstance(self.end, WorldCrashed), repr(self.end)
        assert self.end.message
        assert self.generation is None or list(self.generation) == []
        return None


def kill(world: LinuxWorld) -> None:
    if (pid := world.pid) is not None:
        os.kill(pid, signal.SIGKILL)


def kill_again_and_again(world: LinuxWorld, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    pause = threading.Event()
    right = {m: Client(world, f"first-{m}", m).outcome() for m in MODELS}
    assert None not in right.values()
    errors = 0
    for number in range(kills):
        asked = [(m, Client(world, f"{number}-{i}", m)) for i, m in enumerate(MODELS * 2)]
        pause.wait(rng.choice((0, 0.003, 0.01, 0.03, 0.1)) * rng.random())
        kill(world)
        if rng.random() < 0.3:  # and while it starts again
            pause.wait(rng.random())
            kill(world)
        for model, client in asked:
            answer = client.outcome()
            errors += answer is None
            assert answer in (None, right[model])
        # It recovers, with every model. (A second kill may still be on its way to a client: once.)
        for model in MODELS:
            answers = [Client(world, f"{number}-{model}-{n}", model).outcome() for n in range(2)]
            assert answers[-1] == right[model]
    status = world.status()
    assert status.restarts >= kills * 0.8
    assert sorted(m.info.name for m in status.models) == sorted(MODELS)
    assert errors > 0  # the kills did hit


def test_a_world_killed_ten_times_loses_no_request(world: LinuxWorld) -> None:
    kill_again_and_again(world, 10, seed=1)


@pytest.mark.slow
def test_a_world_killed_a_hundred_times_loses_no_request(world: LinuxWorld) -> None:
    kill_again_and_again(world, 100, seed=2)


def test_a_registration_during_a_restart_waits_for_it_and_succeeds(world: LinuxWorld, device: Device) -> None:
    three, _ = device.add_kit("three", TINY)
    old = world.pid
    kill(world)
    while world.pid == old:
        threading.Event().wait(0.001)
    done: list[object] = []
    thread = threading.Thread(target=lambda: done.append(world.register(three)), daemon=True)
    thread.start()
    thread.join(60)
    assert done, "it waits for ever"
    assert Client(world, "x", "three").outcome()


def test_a_kill_during_a_registration_is_one_clear_error(
    world: LinuxWorld, sources: list[ModelSource]
) -> None:
    outcomes: list[object] = []

    def register() -> None:
        for _ in range(20):
            try:
                world.register(sources[0])
            except FlexServeError as error:
                outcomes.append(error)

    thread = threading.Thread(target=register, daemon=True)
    thread.start()
    threading.Event().wait(0.05)
    kill(world)
    thread.join(60)
    assert not thread.is_alive()
    assert len(outcomes) <= 1
    assert Client(world, "after", MODELS[0]).outcome()


def test_half_a_character_is_refused_and_takes_no_place(world: LinuxWorld) -> None:
    for number in range(70):  # more than may be in flight
        with pytest.raises(FlexServeError) as caught:
            world.generate(Request(id=str(number), model="one", prompt="\ud800"))
        assert caught.value.code == "invalid_request"
    assert Client(world, "after", "one").outcome()


def test_registering_again_and_again_leaks_no_descriptor(
    world: LinuxWorld, sources: list[ModelSource]
) -> None:
    def descriptors() -> int:
        return len(os.listdir(f"/proc/{world.pid}/fd"))  # noqa: PTH208

    before = descriptors()
    for _ in range(5):
        world.register(sources[0])
    deadline = time.monotonic() + 30  # the last one that was replaced is closed behind the answer
    while descriptors() != before:
        assert time.monotonic() < deadline, descriptors() - before
        time.sleep(0.01)
    assert Client(world, "after", MODELS[0]).outcome()


def test_recalls_and_status_go_on_while_models_are_replaced(
    world: LinuxWorld, sources: list[ModelSource], tmp_path: Path
) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []

    def bother() -> None:
        while not stop.is_set():
            try:
                world.recall(1 << 40).wait()
                world.status()
            except BaseException as error:
                failures.append(error)
                return

    thread = threading.Thread(target=bother, daemon=True)
    thread.start()
    for number in range(15):
        world.register(sources[number % 2])
        assert Client(world, f"{number}", MODELS[number % 2]).outcome()
    stop.set()
    thread.join(30)
    assert not failures
    assert world.status().restarts == 0


def test_what_stops_a_service_is_for_the_normal_world_which_saves_first(world: LinuxWorld) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        assert world.pid is not None
        os.kill(world.pid, number)  # as it reaches the whole group
    assert Client(world, "after", MODELS[0]).outcome()
    assert world.status().restarts == 0
