"""Which processors the secure process's threads may use, asked of the kernel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexserve.flexmem.loader import WORKERS
from flexserve.worlds.base import ModelSource

from ..world_fixtures import Device, linux_world


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor: every thread is on it")
def test_a_model_s_loader_may_use_every_processor_although_compute_threads_are_bound(
    device: Device, source: ModelSource
) -> None:
    allowed = os.sched_getaffinity(0)

    with linux_world(device, threads=len(allowed)) as world:

        def unbound() -> int:
            tasks = Path(f"/proc/{world.pid}/task").iterdir()
            return sum(os.sched_getaffinity(int(task.name)) == allowed for task in tasks)

        before = unbound()
        world.register(source)
        assert unbound() - before >= WORKERS
