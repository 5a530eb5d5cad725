"""Who used the processor: a process's threads, and the host that took it away. Reads /proc only."""

from __future__ import annotations

import os
import time
from pathlib import Path

BUSY_S = 0.5  # how long others are watched before something is measured
BUSY_CORES = 0.2  # used by others: more than this, and times mean little
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def thread_cpu_s(pid: int) -> dict[int, float]:
    """Processor seconds of each thread of a process so far, by thread id (/proc/PID/task/*/schedstat)."""
    used: dict[int, float] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            try:
                used[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
            except (OSError, ValueError, IndexError):  # a kernel without it: in ticks of 10 ms
                after_name = (task / "stat").read_text().rpartition(")")[2].split()
                used[int(task.name)] = (int(after_name[11]) + int(after_name[12])) * _TICK_S
        except FileNotFoundError:  # it has ended
            continue
    return used


def since(before: dict[int, float], after: dict[int, float]) -> dict[int, float]:
    """What each thread used between two readings."""
    return {thread: used - before.get(thread, 0.0) for thread, used in after.items()}


def steal_s() -> float:
    """Seconds, summed over the cores, in which the host ran something else (/proc/stat)."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(fields[8]) * _TICK_S if len(fields) > 8 else 0.0


def busy_s() -> float:
    """Seconds in which the cores were in use or taken by the host, summed, since boot; in ticks (/proc/stat)."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) * _TICK_S


def busy_cores(seconds: float) -> float:
    """How many cores are in use while this thread sleeps for that long: by everybody else (/proc/stat)."""
    before, start = busy_s(), time.perf_counter()
    time.sleep(seconds)
    return (busy_s() - before) / (time.perf_counter() - start)
