"""The manager between a machine that says what the test wants and a fake world; what it logs, and how it stops."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexserve.core import Budget, Request
from flexserve.normal.manager import MemoryManager
from flexserve.normal.policy import MIB, Limit, Offer, Recall, Settings, Why
from flexserve.normal.pressure import Memory, Woken
from flexserve.worlds.fake import FakeWorld, write_fake_model

SETTINGS = Settings(64 * MIB, 128 * MIB, 16 * MIB, calm_s=30.0)


@dataclasses.dataclass
class Machine:
    """Memory, time and events as a test sets them; the manager's watch."""

    available: int = 1 << 30
    now_s: float = 0.0
    woken: threading.Event = dataclasses.field(default_factory=threading.Event)
    waits: int = 0
    closed: bool = False

    def memory(self) -> Memory:
        return Memory(8 << 30, self.available, self.available)

    def wait(self, timeout_s: float) -> Woken:
        assert timeout_s == SETTINGS.period_s
        self.waits += 1
        self.woken.wait()
        self.woken.clear()
        return Woken()

    def wake(self) -> None:
        self.woken.set()

    def close(self) -> None:
        self.closed = True


@dataclasses.dataclass
class Managed:
    world: FakeWorld
    machine: Machine
    manager: MemoryManager
    said: list[str]


@pytest.fixture
def managed(tmp_path: Path) -> Iterator[Managed]:
    """A manager that was not started, over a world which holds a model of 48 MiB and may hold 64."""
    world = FakeWorld(budget=Budget(64 * MIB, 256 * MIB, 8 * MIB, 0))
    world.start()
    world.register(write_fake_model(tmp_path, "m", weight_bytes=48 * MIB))
    list(world.generate(Request("r", "m", prompt="hello")))
    machine = Machine()
    said: list[str] = []
    manager = MemoryManager(
        world,
        said.append,
        settings=SETTINGS,
        watch=machine,
        memory=machine.memory,
        clock=lambda: machine.now_s,
    )
    yield Managed(world, machine, manager, said)
    world.close()
    manager.close()
    assert machine.closed


def test_while_memory_is_plenty_it_says_nothing(managed: Managed) -> None:
    assert managed.manager.look(Woken()) is None
    assert managed.said == []


def test_it_recalls_what_is_missing_and_says_so_in_one_line(managed: Managed) -> None:
    managed.machine.available = 60 * MIB
    assert managed.manager.look(Woken()) == Recall(40 * MIB, Why.LOW)
    assert managed.world.budget().held_bytes == 8 * MIB
    (line,) = managed.said
    assert line.startswith("memory manager: recalled 40 MiB of 40 MiB, chosen after ")
    assert line.endswith(": available memory is below the low watermark (60 MiB available)")


def test_it_limits_what_could_be_taken_before_it_is_taken(managed: Managed) -> None:
    managed.world.budget(soft_bytes=256 * MIB)
    managed.machine.available = 100 * MIB
    assert managed.manager.look(Woken()) == Limit(68 * MIB)
    assert managed.world.budget().soft_bytes == 68 * MIB
    assert managed.said == [
        "memory manager: the budget is 68 MiB now: more could be taken than is available (100 MiB available)"
    ]


def test_it_offers_after_calm_and_in_steps(managed: Managed) -> None:
    managed.machine.now_s = 29.0
    assert managed.manager.look(Woken()) is None
    managed.machine.now_s = 30.0
    assert managed.manager.look(Woken()) == Offer(16 * MIB)
    assert managed.world.budget().soft_bytes == 80 * MIB
    assert managed.said == [
        "memory manager: offered 16 MiB, the budget is 80 MiB: memory is available again (1024 MiB available)"
    ]


def test_it_offers_what_an_answer_asks_for_without_waiting_for_calm(managed: Managed, tmp_path: Path) -> None:
    world = FakeWorld(budget=Budget(64 * MIB, 256 * MIB, 8 * MIB, 0, wanted_bytes=100 * MIB))
    world.start()
    said: list[str] = []
    machine = Machine(now_s=0.0)
    manager = MemoryManager(
        world,
        said.append,
        settings=SETTINGS,
        watch=machine,
        memory=machine.memory,
        clock=lambda: machine.now_s,
    )
    try:
        machine.now_s = SETTINGS.wanted_calm_s
        assert manager.look(Woken()) == Offer(100 * MIB, Why.WANTED)
        assert (world.budget().soft_bytes, world.budget().wanted_bytes) == (164 * MIB, 0)
        assert said == [
            "memory manager: offered 100 MiB, the budget is 164 MiB: an answer could use it (1024 MiB available)"
        ]
        assert manager.look(Woken()) is None
    finally:
        world.close()
        manager.close()


def test_a_world_that_does_not_answer_is_said_once(managed: Managed) -> None:
    managed.world.close()
    for _ in range(3):
        assert managed.manager.look(Woken()) is None
    assert managed.said == ["memory manager: the world is closed"]


def test_it_stops_while_it_waits_and_after_it_acts(managed: Managed) -> None:
    managed.machine.available = 60 * MIB
    managed.machine.wake()
    managed.manager.start()
    managed.manager.stop()
    managed.manager.close()
    waits = managed.machine.waits
    managed.machine.wake()
    assert managed.machine.waits == waits


def test_an_error_while_it_stops_is_nobodys_concern(managed: Managed) -> None:
    managed.manager.stop()
    managed.world.close()
    managed.manager.look(Woken())
    assert managed.said == []


def test_on_this_machine_it_finds_out_everything_itself(managed: Managed) -> None:
    said: list[str] = []
    manager = MemoryManager(managed.world, said.append)
    assert manager.settings.low_bytes > 0
    manager.start()
    manager.close()
    assert all("memory manager: " in line for line in said)
