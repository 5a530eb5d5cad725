"""The state of free memory before a measurement.

In a virtual machine the first touch of memory that the host has taken back (free page reporting, a balloon)
costs several times the first touch of memory that it backs. Reporting begins 2 s after something was freed and
takes a sixteenth of all free memory every 2 s; the kernel hands out first what was freed last. So a state is only
true of the moment after it was made, and both are made anew before every measurement:

    backed   this process touches as much as any side may take and frees it just before the measurement, and just
             after a pass of the reporting where the kernel counts them
    idle     the reporting of whatever was freed before has come to its end

Either way a probe takes a few fresh huge pages last and says what a first touch really costs.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from ..errors import EngineFailure
from ..flexmem import uffd
from ..flexmem.uffd import libc

SPARE_BYTES = 1 << 30  # left for everybody else on the machine
BLOCK_BYTES = 256 << 20
PROBE_BYTES = 32 * uffd.HUGE_PAGE
SETTLE_S = 2.5  # longer than the 2 s after which reporting begins
QUIET_BYTES = 8 << 20  # reported in QUIET_S: less than the probe takes, so that it meets reported memory
QUIET_S = 5.0
PASS_S = 2.5  # longest wait for a pass of the reporting: longer than from one to the next
PASS_OVER_S = 0.1  # nothing was reported for so long
IDLE_S = 45.0  # longest wait, and the only one where the kernel does not count what it reports

_REPORTED = Path("/sys/module/page_reporting/parameters/reported_kib")


class MemoryState(StrEnum):
    """State of the machine's free memory before a cold start."""

    BACKED = "backed"
    IDLE = "idle"


@dataclass(frozen=True)
class Condition:
    """What the memory really was like when a measurement began."""

    first_touch_s_per_gb: float  # of the probe; huge pages where the kernel gives them
    prepare_s: float


class FreeMemory(Protocol):
    """`prepare`, then `release` just before the measurement, again and again; `close` at the end."""

    def prepare(self) -> None: ...

    def release(self) -> Condition: ...

    def close(self) -> None: ...


def meminfo_bytes(key: str) -> int:
    """A line of /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise EngineFailure(f"/proc/meminfo does not say {key}")


def reported_bytes() -> int | None:
    """What free page reporting has handed back to the host since boot; None where the kernel does not count it."""
    try:
        return int(_REPORTED.read_text()) * 1024
    except (OSError, ValueError):
        return None


def _wait_for_a_pass() -> None:
    """Until a pass of free page reporting is over, or none comes: the next one is 2 s away."""
    deadline = time.perf_counter() + PASS_S
    begun, changed = reported_bytes(), 0.0
    last = begun
    while last is not None and (now := time.perf_counter()) < deadline:
        time.sleep(PASS_OVER_S / 5)
        if (reported := reported_bytes()) != last:
            last, changed = reported, now
        elif last != begun and now - changed > PASS_OVER_S:
            break


class Block:
    """Touched memory of this process."""

    def __init__(self, length: int, *, huge: bool = True) -> None:
        self._length = length
        self._address = uffd.reserve(length, align=uffd.HUGE_PAGE)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            uffd.advise(self._address, length, uffd.MADV_HUGEPAGE if huge else uffd.MADV_NOHUGEPAGE)
        start = time.perf_counter()
        try:
            uffd.advise(self._address, length, uffd.MADV_POPULATE_WRITE)
        except OSError:  # before Linux 5.14
            for at in range(0, length, mmap.PAGESIZE):
                libc.memset(self._address + at, 1, 1)
        self.touch_s = time.perf_counter() - start

    def free(self) -> None:
        uffd.release(self._address, self._length)


def first_touch_s_per_gb(length: int, *, huge: bool) -> float:
    """Touch fresh memory and give it back."""
    block = Block(length, huge=huge)
    block.free()
    return block.touch_s / (length / 1e9)


class _Probe:
    """Fresh memory taken last of all. Kept until the next time: given back it would be backed memory."""

    def __init__(self) -> None:
        self._block: Block | None = None

    def take(self) -> float:
        self.drop()
        self._block = Block(PROBE_BYTES)
        return self._block.touch_s / (PROBE_BYTES / 1e9)

    def drop(self) -> None:
        if self._block is not None:
            self._block.free()
            self._block = None


class Backed:
    """Touches and holds `need_bytes`, and frees them just before each measurement.

    Not all free memory: that takes a minute, and the host would take it back during the measurement.
    """

    def __init__(self, need_bytes: int) -> None:
        """`need_bytes`: what a measurement may take at most, page cache included."""
        self._need = need_bytes
        self._blocks: list[Block] = []
        self._probe = _Probe()
        self._prepare_s = 0.0

    def prepare(self) -> None:
        """Raises `EngineFailure` when the machine has less than is needed."""
        start = time.perf_counter()
        self._probe.drop()
        count = -(-self._need // BLOCK_BYTES) - len(self._blocks)
        if meminfo_bytes("MemAvailable") < SPARE_BYTES + count * BLOCK_BYTES:
            raise EngineFailure(
                f"measuring this model takes {self._need >> 20} MiB of free memory, and there is less",
                hint="end other programs, or measure a smaller shape",
            )
        self._blocks += [Block(BLOCK_BYTES) for _ in range(count)]
        # What the side freed while it made itself ready is reported before the measurement, not during it.
        time.sleep(max(0.0, start + SETTLE_S - time.perf_counter()))
        self._prepare_s = time.perf_counter() - start

    def release(self) -> Condition:
        """Everything the measurement gets now is backed."""
        _wait_for_a_pass()
        self._free()
        return Condition(self._probe.take(), self._prepare_s)

    def _free(self) -> None:
        while self._blocks:
            self._blocks.pop().free()

    def close(self) -> None:
        self._probe.drop()
        self._free()


class Idle:
    """Leaves the machine alone until nothing is handed back to the host any more."""

    def __init__(self) -> None:
        self._probe = _Probe()
        self._prepare_s = 0.0

    def prepare(self) -> None:
        """Wait for the end of free page reporting, IDLE_S at most."""
        start = time.perf_counter()
        self._probe.drop()
        while (left := start + IDLE_S - time.perf_counter()) > 0:
            before = reported_bytes()
            time.sleep(min(left, QUIET_S))
            after = reported_bytes()
            if before is not None and after is not None and after - before < QUIET_BYTES:
                break
        self._prepare_s = time.perf_counter() - start

    def release(self) -> Condition:
        return Condition(self._probe.take(), self._prepare_s)

    def close(self) -> None:
        self._probe.drop()


def free_memory(state: MemoryState, need_bytes: int) -> FreeMemory:
    """What brings free memory into `state`."""
    return Backed(need_bytes) if state == MemoryState.BACKED else Idle()
