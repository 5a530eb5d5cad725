"""What is read of the machine: real files where this machine has them, and files that look like them."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from flexserve.errors import StorageFailure
from flexserve.normal import pressure
from flexserve.normal.pressure import Memory, PressureWatch, Woken, own_groups, read_memory

MEMINFO = "MemTotal:       2048 kB\nMemFree:         512 kB\nMemAvailable:   1024 kB\nHugePages_Total: 0\n"


def watch(psi: Path, group: Path | None = None) -> PressureWatch:
    return PressureWatch(stall_s=0.15, window_s=2.0, psi=psi, group=group)


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text(MEMINFO)
    return path


@pytest.fixture
def group(tmp_path: Path) -> Path:
    """A control group that is limited to 1 MiB and uses half of it."""
    path = tmp_path / "group"
    path.mkdir()
    for name, text in {
        "memory.high": "1048576\n",
        "memory.max": "max\n",
        "memory.current": "524288\n",
        "memory.stat": "anon 1\ninactive_file 262144\nactive_file 7\n",
        "memory.events": "low 0\nhigh 3\nmax 0\noom 0\n",
    }.items():
        (path / name).write_text(text)
    return path


def test_this_machine_says_how_much_memory_it_has() -> None:
    memory = read_memory()
    assert 0 < memory.free_bytes < memory.total_bytes
    assert 0 < memory.available_bytes < memory.total_bytes


def test_the_closest_limit_holds(meminfo: Path, group: Path) -> None:
    assert read_memory(meminfo) == Memory(2 << 20, 1 << 20, 512 << 10)
    assert read_memory(meminfo, (group,)) == Memory(1 << 20, 768 << 10, 512 << 10)
    (group / "memory.high").write_text("max\n")
    assert read_memory(meminfo, (group,)) == read_memory(meminfo)


@pytest.mark.parametrize("text", ["", "MemTotal: 1 kB\n", MEMINFO.replace("1024", "many")])
def test_a_machine_that_does_not_say_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "meminfo").write_text(text)
    with pytest.raises(StorageFailure, match="does not say how much memory"):
        read_memory(tmp_path / "meminfo")
    with pytest.raises(StorageFailure):
        read_memory(tmp_path / "nothing")


def test_our_control_groups_are_found_innermost_first(tmp_path: Path) -> None:
    own, root = tmp_path / "own", tmp_path / "fs"
    inner = root / "user.slice" / "app"
    inner.mkdir(parents=True)
    (root / "cgroup.controllers").touch()
    for directory in (inner, inner.parent):
        (directory / "memory.high").write_text("max\n")
    own.write_text("4:memory:/old\n0::/user.slice/app\n")
    absent = tmp_path / "absent"
    assert own_groups(own, (absent, root)) == (inner, inner.parent)  # and not the root, which has no limit
    own.write_text("4:memory:/old\n")
    assert own_groups(own, (root,)) == ()
    assert own_groups(absent, (root,)) == ()
    assert own_groups(own, (absent,)) == ()


@pytest.mark.skipif(not pressure.PSI_PATH.exists(), reason="this kernel has no pressure stall information")
def test_the_kernel_takes_the_trigger_of_an_unprivileged_process() -> None:
    real = watch(pressure.PSI_PATH)
    assert real.missing == []
    real.wake()
    assert not real.wait(30.0).throttled
    real.close()


@pytest.mark.parametrize("kind", ["absent", "directory"])
def test_without_pressure_information_it_says_so_and_only_waits(tmp_path: Path, kind: str) -> None:
    path = tmp_path if kind == "directory" else tmp_path / "absent"
    without = watch(path)
    assert [text.partition(": ")[0] for text in without.missing] == [str(path)]
    assert without.wait(0.0) == Woken()
    without.close()


def test_somebody_who_waits_for_memory_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    # Urgent data makes POLLPRI at will, as the kernel does on a trigger's descriptor.
    server = socket.create_server(("127.0.0.1", 0))
    kernel = socket.create_connection(server.getsockname())
    trigger, _ = server.accept()
    monkeypatch.setattr(PressureWatch, "_open_psi", lambda *_: os.dup(trigger.fileno()))
    woken = watch(Path("trigger"))
    assert woken.wait(0.0) == Woken()
    kernel.send(b"!", socket.MSG_OOB)
    assert woken.wait(30.0) == Woken(stalled=True)
    woken.close()
    for sock in (server, kernel, trigger):
        sock.close()


def test_going_over_memory_high_is_noticed_once(tmp_path: Path, group: Path) -> None:
    seen = watch(tmp_path / "absent", group)
    assert seen.wait(0.0) == Woken()
    (group / "memory.events").write_text("low 0\nhigh 5\nmax 0\noom 0\n")
    assert seen.wait(0.0) == Woken(throttled=True)
    assert seen.wait(0.0) == Woken()
    seen.close()


def test_a_group_without_events_is_said(tmp_path: Path) -> None:
    without = watch(tmp_path / "absent", tmp_path)
    assert len(without.missing) == 2
    assert without.wait(0.0) == Woken()
    without.close()


def test_a_wait_ends_when_another_thread_says_so(tmp_path: Path) -> None:
    waiting = watch(tmp_path / "absent")
    thread = threading.Thread(target=waiting.wait, args=(3600.0,))
    thread.start()
    waiting.wake()
    thread.join(60)
    assert not thread.is_alive()
    waiting.close()
