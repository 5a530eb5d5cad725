"""The page cache, the state of free memory, and who used the processor."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from flexserve.bench import machine, memory, processor
from flexserve.bench.memory import Backed, Idle
from flexserve.errors import EngineFailure


def test_an_evicted_file_has_no_page_in_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    machine.warm(path)
    machine.evict(path)
    machine.check_evicted(path)
    with path.open("rb") as file:
        assert machine.cached_pages(file.fileno()) == 0
        file.read(1 << 16)
        assert machine.cached_pages(file.fileno()) > 0
    with pytest.raises(EngineFailure, match="just before a cold start"):
        machine.check_evicted(path)


def test_backed_memory_is_held_until_it_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BLOCK_BYTES", 4 << 20)
    monkeypatch.setattr(memory, "SETTLE_S", 0.0)
    backed = Backed(10 << 20)
    before = _resident_bytes()
    try:
        backed.prepare()
        held = _resident_bytes() - before
        assert held > 11 << 20
        condition = backed.release()
        assert _resident_bytes() - before < held - (11 << 20) + memory.PROBE_BYTES + (1 << 20)
        assert condition.first_touch_s_per_gb > 0
        backed.prepare()  # the probe is gone, the blocks are back
        assert abs(_resident_bytes() - before - held) < 2 << 20
    finally:
        backed.close()
    assert _resident_bytes() - before < 2 << 20


def test_too_little_memory_is_an_error_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "meminfo_bytes", lambda _key: 0)
    with pytest.raises(EngineFailure, match="10 MiB of free memory"):
        Backed(10 << 20).prepare()


def test_idle_ends_when_the_host_gets_nothing_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    handed_back = iter([0, 1 << 30, 1 << 30, (1 << 30) + 4096])
    slept: list[float] = []
    monkeypatch.setattr(memory, "reported_bytes", lambda: next(handed_back))
    monkeypatch.setattr(time, "sleep", slept.append)
    idle = Idle()
    idle.prepare()
    assert slept == [memory.QUIET_S] * 2
    assert idle.release().first_touch_s_per_gb > 0
    idle.close()


def test_the_processor_time_of_a_thread_is_its_own() -> None:
    before = processor.thread_cpu_s(os.getpid())
    ids: list[int] = []

    def work() -> None:
        ids.append(threading.get_native_id())
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass
        done.set()
        stop.wait()

    done, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    done.wait()
    used = processor.since(before, processor.thread_cpu_s(os.getpid()))
    stop.set()
    thread.join()
    assert 0.04 < used[ids[0]] < 0.5
    assert processor.steal_s() >= 0


def _resident_bytes() -> int:
    line = next(s for s in Path("/proc/self/smaps_rollup").read_text().splitlines() if s.startswith("Rss:"))
    return int(line.split()[1]) * 1024
