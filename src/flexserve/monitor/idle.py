"""The reference model of what EL3's timer decides: protection off by itself, or on by a request in the request page.

Knows what firmware/el3/idle.c must do: tests drive both alike. Times are ticks of the machine's counter, below 2^64.
Does not know who holds Flex-Mem: EL2 refuses then, and EL3 asks again later.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from .abi import REQUEST_ON

NEVER = 0
END_OF_TIME = (1 << 64) - 1


class Decision(IntEnum):
    """What a CPU does at a timer interrupt."""

    WAIT = 0
    OFF = 1  # ask EL2 whether protection can go off
    ON = 2  # measure EL2, and turn protection on if it is what it was at boot


@dataclass
class Idle:
    """Shared by all CPUs. `acted`: the last ON and the last OFF."""

    poll: int
    gap: int
    window: int = 0
    used: int = 0
    acted: list[int] = field(default_factory=lambda: [0, 0])

    def use(self, now: int) -> None:
        """The trusted OS was entered or left, or protection came on."""
        self.used = now

    def set_window(self, ticks: int, now: int) -> None:
        """IDLE_WINDOW."""
        self.window, self.used = ticks, now

    def decide(self, now: int, on: bool, request: int) -> Decision:
        """At a timer interrupt on a CPU that is in the normal world's EL1."""
        due = 0 < self.window <= max(now - self.used, 0) if on else request == REQUEST_ON
        if not due or max(now - self.acted[on], 0) < self.gap:
            return Decision.WAIT
        self.acted[on] = now
        return Decision.OFF if on else Decision.ON

    def next(self, now: int, on: bool) -> int:
        """When the timer interrupts again, or `NEVER`."""
        if not on:
            return now + self.poll
        if self.window == 0:
            return NEVER
        due = self.used + self.window
        if due > END_OF_TIME:
            return END_OF_TIME
        return due if due > now else now + max(self.window // 2, self.gap)
