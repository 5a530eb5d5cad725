"""The reference model of the switch of protection, as one CPU sees it: off, on again, the timer and the request page.

Knows what firmware/el3/protect.c must do; tests drive both alike. Does not know how other CPUs are stopped, or who
holds Flex-Mem: EL2 answers that before it asks for FREEZE.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from .abi import RequestWord, Status
from .idle import Decision, Idle

POLLS_PER_SECOND = 100
ANSWERS_PER_SECOND = 20
WORDS = 512
UNSIGNED = (1 << 64) - 1


class Protection(IntEnum):
    """As PROTECT_STATUS and the request page tell it."""

    OFF = 0
    ON = 1
    TAMPERED = 2


class Next(IntEnum):
    """Where a CPU goes on after a timer interrupt."""

    SAME = 0  # where it was
    EL2_ASKED = 1  # in EL2, which knows whether protection can go off
    EL2_STARTED = 2  # in EL2's entry, and then where it was, protected


@dataclass
class Switch:
    """`frequency`: ticks in a second. `changed`: EL2's image is not what was measured at boot."""

    frequency: int
    now: int
    changed: bool = False
    protection: Protection = Protection.ON
    measured: int = 0
    timer: int = 0  # when it interrupts; 0 never
    page: list[int] = field(default_factory=lambda: [0] * WORDS)

    def __post_init__(self) -> None:
        self.idle = Idle(self.frequency // POLLS_PER_SECOND, self.frequency // ANSWERS_PER_SECOND)
        self._answer(Status.OK)

    def _answer(self, status: Status) -> None:
        self.page[RequestWord.ANSWER] = status & UNSIGNED
        self.page[RequestWord.STATE] = self.protection
        self.page[RequestWord.REQUEST] = 0

    def _set_timer(self) -> None:
        self.timer = self.idle.next(self.now, self.protection == Protection.ON)

    def visit(self) -> None:
        """The trusted OS is entered or left."""
        self.idle.use(self.now)

    def window(self, ticks: int) -> None:
        """IDLE_WINDOW."""
        self.idle.set_window(ticks, self.now)
        self._set_timer()

    def tick(self, at_el1: bool) -> Next:
        """EL3's timer interrupts the CPU in the normal world's EL1, or elsewhere."""
        on, after = self.protection == Protection.ON, Next.SAME
        request = 0 if on else self.page[RequestWord.REQUEST]
        decision = self.idle.decide(self.now, on, request) if at_el1 else Decision.WAIT
        if decision == Decision.OFF:
            after = Next.EL2_ASKED
        elif decision == Decision.ON and self.turn_on() == Status.OK:
            after = Next.EL2_STARTED
        self._set_timer()
        return after

    def freeze(self) -> Status:
        """EL2 agrees: protection off, unless EL2 is not what it was."""
        self.measured += 1
        if self.changed:
            return Status.TAMPERED
        self.protection = Protection.OFF
        self._answer(Status.OK)
        self._set_timer()
        return Status.OK

    def turn_on(self) -> Status:
        """PROTECT_ON while it is off."""
        self.measured += 1
        status = Status.TAMPERED if self.changed else Status.OK
        self.protection = Protection.TAMPERED if self.changed else Protection.ON
        if status == Status.OK:
            self.idle.use(self.now)
            self._set_timer()
        self._answer(status)
        return status
