"""What Linux says about memory: how much is available, and who has to wait for it.

Knows /proc/meminfo, pressure stall information (kernel: Documentation/accounting/psi.rst) and control groups
(Documentation/admin-guide/cgroup-v2.rst). Decides nothing. Every path can be another, for tests.
"""

from __future__ import annotations

import contextlib
import os
import select
from dataclasses import dataclass
from pathlib import Path

from ..errors import StorageFailure

PSI_PATH = Path("/proc/pressure/memory")
MEMINFO_PATH = Path("/proc/meminfo")
OWN_GROUP_PATH = Path("/proc/self/cgroup")
GROUP_ROOTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))  # version 2 alone, or beside version 1
_FAILED = select.POLLERR | select.POLLNVAL


@dataclass(frozen=True)
class Memory:
    """Bytes: of the machine, or of the control group where that is the closer limit."""

    total_bytes: int
    available_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Woken:
    """Why a wait ended; neither: its time was over, or somebody called `wake`."""

    stalled: bool = False
    throttled: bool = False


def read_memory(meminfo: Path = MEMINFO_PATH, groups: tuple[Path, ...] = ()) -> Memory:
    """What is available now. `groups`: control groups whose limits hold for us. Raises `StorageFailure`."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        total, available, free = (
            int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable", "MemFree")
        )
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise StorageFailure(f"{meminfo} does not say how much memory is available") from error
    for group in groups:
        limit = min(_number(group / "memory.high"), _number(group / "memory.max"))
        used = _number(group / "memory.current")
        if limit >= total or used == _NO_LIMIT:
            continue
        # As the machine's MemAvailable: page cache that nobody used for a while costs nobody anything.
        left = max(limit - used + _statistic(group / "memory.stat", "inactive_file"), 0)
        total, available, free = limit, min(available, left), min(free, max(limit - used, 0))
    return Memory(total, available, free)


_NO_LIMIT = 1 << 62


def _number(path: Path) -> int:
    """A file with one number; none, or `max`: no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return _NO_LIMIT


def _statistic(path: Path, name: str) -> int:
    """A line of a file of `name number` lines; 0 where there is none."""
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def own_groups(own: Path = OWN_GROUP_PATH, roots: tuple[Path, ...] = GROUP_ROOTS) -> tuple[Path, ...]:
    """Our control group (version 2) and those above it that have a memory controller, the innermost first."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return ()
    path = next((line[3:] for line in lines if line.startswith("0::/")), None)
    if path is None:
        return ()
    for root in roots:
        if (root / "cgroup.controllers").exists():
            group = root / path.lstrip("/")
            inside = [group, *group.parents][: len(Path(path).parts)]
            return tuple(g for g in inside if (g / "memory.high").exists())
    return ()


class PressureWatch:
    """Waits until somebody has to wait for memory, or until its time is over. One thread waits; any may `wake`."""

    def __init__(
        self,
        *,
        stall_s: float,
        window_s: float,
        psi: Path = PSI_PATH,
        group: Path | None = None,
    ) -> None:
        """`group`: our control group, whose memory.events are watched. `missing` says what this machine has not."""
        self.missing: list[str] = []
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._psi = self._open_psi(psi, stall_s, window_s)
        self._events = self._open_events(group)
        for fd in (self._psi, self._events):
            if fd is not None:
                self._poll.register(fd, select.POLLPRI)
        self._high = self._read_high()

    def _open_psi(self, path: Path, stall_s: float, window_s: float) -> int | None:
        """The trigger lives as long as its descriptor (psi.rst)."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self.missing.append(f"{path}: {error.strerror}")
            return None
        try:
            os.write(fd, f"some {round(stall_s * 1e6)} {round(window_s * 1e6)}\0".encode())
        except OSError as error:
            os.close(fd)
            self.missing.append(f"{path}: {error.strerror}")
            return None
        return fd

    def _open_events(self, group: Path | None) -> int | None:
        if group is None:
            return None
        try:
            return os.open(group / "memory.events", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self.missing.append(f"{group / 'memory.events'}: {error.strerror}")
            return None

    def _read_high(self) -> int:
        """How often the group went over memory.high; reading also says that we have seen the change."""
        if self._events is None:
            return 0
        with contextlib.suppress(OSError, ValueError):
            for line in os.pread(self._events, 4096, 0).decode().splitlines():
                name, _, count = line.partition(" ")
                if name == "high":
                    return int(count)
        return 0

    def wait(self, timeout_s: float) -> Woken:
        """Until something happens, at most `timeout_s`."""
        ready = dict(self._poll.poll(timeout_s * 1000))
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        stalled = False
        if self._psi is not None and self._psi in ready:
            if ready[self._psi] & _FAILED:  # its group is gone; POLLERR would come again and again
                self._drop_psi()
            else:
                stalled = True
        before, self._high = self._high, self._read_high()
        return Woken(stalled, self._high > before)

    def _drop_psi(self) -> None:
        assert self._psi is not None
        self._poll.unregister(self._psi)
        os.close(self._psi)
        self._psi = None

    def wake(self) -> None:
        """End the wait that is going on, or the next one. From any thread."""
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Nobody may wait any more."""
        for fd in (self._psi, self._events, self._wake):
            if fd is not None:
                os.close(fd)
        self._psi = self._events = None
