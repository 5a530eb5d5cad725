"""Idle weights are handed to the kernel, and with `--no-lazy` they are not."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexserve.core import Request
from flexserve.framework.settings import Settings
from flexserve.worlds.linux import LinuxWorld

from ..sealed_fixtures import TINY
from ..world_fixtures import Device, linux_world, make_device

AT_ONCE = Settings(budget_bytes=1 << 30, floor_bytes=0, lazy_after_s=0.0, calm_s=0.0)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    yield make_device(tmp_path)


def handed_over(world: LinuxWorld) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in world.trace()]
    return [row["do"] for row in rows if "do" in row and row["do"]["type"] == "HandLazily"]


def answer(world: LinuxWorld, name: str) -> tuple[int, ...]:
    request = Request(name, "m", token_ids=(1, 2, 3), max_tokens=4, ignore_eos=True)
    return list(world.generate(request))[-1].token_ids  # type: ignore[union-attr]


def test_idle_weights_become_lazy_unless_the_world_is_told_not_to(device: Device) -> None:
    source, _ = device.add_kit("m", TINY)
    with linux_world(device, settings=AT_ONCE) as world:
        world.register(source)
        answer(world, "a")
        wait = threading.Event()
        while not world.status().models[0].lazy_bytes:
            wait.wait(0.01)
        assert handed_over(world)
    with linux_world(device, settings=AT_ONCE, lazy=False) as world:
        world.register(source)
        answer(world, "a")
        answer(world, "b")
        assert handed_over(world) == []
        assert world.status().models[0].lazy_bytes == 0
        assert world.status().models[0].resident_bytes > 0
