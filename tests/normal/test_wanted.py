"""An answer that stopped for want of memory says what it wants, and the manager gives it where there is plenty."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flexserve.core import Finished, Request, Sampling
from flexserve.normal.manager import MemoryManager
from flexserve.normal.policy import MIB, Action, Offer, Settings, Why
from flexserve.normal.pressure import Memory, Woken
from flexserve.worlds.linux import LinuxWorld

from ..world_fixtures import DEMO, SMALL_LIMITS, linux_world, make_device

SETTINGS = Settings(64 * MIB, 128 * MIB, 16 * MIB)
PATIENCE_S = 60.0


class Still:
    """Nothing ever wakes the manager."""

    def wait(self, timeout_s: float) -> Woken:
        return Woken()

    def wake(self) -> None: ...

    def close(self) -> None: ...


def request(number: str) -> Request:
    return Request(
        id=number,
        model="demo",
        prompt="Play some music that is not too loud, please.",
        max_tokens=300,
        ignore_eos=True,
        sampling=Sampling(temperature=0),
    )


def eventually(condition: Callable[[], object]) -> None:
    pause, end = threading.Event(), time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never happened"
        pause.wait(0.002)


def wanted(world: LinuxWorld) -> int:
    budget = world.status().budget
    assert budget is not None
    return budget.wanted_bytes


def test_the_manager_gives_a_stopped_answer_what_it_asks_for_and_it_ends_as_if_undisturbed(
    tmp_path: Path,
) -> None:
    device = make_device(tmp_path)
    limits = dataclasses.replace(
        SMALL_LIMITS, floor_bytes=0, stream_window_bytes=2 * MIB, suspend_limit_s=PATIENCE_S
    )
    with linux_world(device, settings=limits) as world:
        world.register(device.add("demo", DEMO))
        *_, undisturbed = world.generate(request("first"))
        now_s = 0.0
        said: list[str] = []
        manager = MemoryManager(
            world,
            said.append,
            settings=SETTINGS,
            watch=Still(),
            memory=lambda: Memory(8 << 30, 1 << 30, 1 << 30),
            clock=lambda: now_s,
        )
        answer = world.generate(request("second"))
        next(answer)
        world.recall(1 << 40).wait(PATIENCE_S)
        eventually(lambda: wanted(world))
        with ThreadPoolExecutor(1) as reader:
            rest = reader.submit(lambda: list(answer))
            actions: list[Action] = []
            while not rest.done() and len(actions) < 2:  # to go on, and then for all of the model
                now_s += SETTINGS.wanted_calm_s
                action = manager.look(Woken())
                actions += [action] if action is not None else []
            *_, last = rest.result(PATIENCE_S)
        manager.close()
        assert all(isinstance(one, Offer) and one.why is Why.WANTED for one in actions), said
        assert actions
        assert isinstance(last, Finished)
        assert isinstance(undisturbed, Finished)
        assert last.token_ids == undisturbed.token_ids
        assert last.timings.suspended_s + last.timings.streamed_bytes > 0, "it was short of memory"
        assert wanted(world) == 0
