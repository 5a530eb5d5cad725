"""Calls about memory, as the normal side sees them: recalls on their way, limits and the trace."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from ...core import Budget
from ...errors import FlexServeError, InvalidRequest
from ..base import Recalled
from .channel import (
    BudgetReported,
    Recall,
    RecallAnswered,
    RecallBegan,
    RecallEnded,
    SetBudget,
    Trace,
    Traced,
)

MAX_DEADLINE_S = 1e6
_Limits = tuple[int | None, int | None, int | None]


def check_bytes(*sizes: int) -> None:
    """Raises `InvalidRequest` for a number that is no size."""
    for nbytes in sizes:
        if not 0 <= nbytes < 1 << 63:
            raise InvalidRequest(f"a number of bytes must be 0 to 2^63 - 1, and this one is {nbytes}")


class LinuxRecalling:
    """One recall (`worlds.base.Recalling`). Times are taken here, so they have the channel in them."""

    def __init__(self, asked_bytes: int) -> None:
        self.asked_bytes = asked_bytes
        self.chosen_bytes = self.later_bytes = 0
        self.answered_s = 0.0
        self._began = time.perf_counter()
        self._changed = threading.Condition()
        self._first_byte_s: float | None = None
        self._end: Recalled | FlexServeError | None = None

    def wait(self, timeout_s: float | None = None) -> Recalled:
        with self._changed:
            if not self._changed.wait_for(lambda: self._end is not None, timeout_s):
                raise TimeoutError(f"the recall of {self.asked_bytes} bytes is not over after {timeout_s} s")
            if isinstance(self._end, FlexServeError):
                raise self._end
            assert self._end is not None
            return self._end

    # For the world only

    def answer(self, chosen_bytes: int, later_bytes: int) -> None:
        with self._changed:
            self.chosen_bytes, self.later_bytes = chosen_bytes, later_bytes
            self.answered_s = time.perf_counter() - self._began

    def first_byte(self) -> None:
        with self._changed:
            if self._first_byte_s is None:
                self._first_byte_s = time.perf_counter() - self._began

    def finish(self, freed_bytes: int) -> None:
        with self._changed:
            done_s = time.perf_counter() - self._began
            first_s = done_s if self._first_byte_s is None else self._first_byte_s
            self._end = Recalled(freed_bytes, first_s, done_s)
            self._changed.notify_all()

    def fail(self, error: FlexServeError) -> None:
        with self._changed:
            if self._end is None:
                self._end = error
                self._changed.notify_all()


class MemoryCalls:
    """What the world asks its secure process about memory. Thread-safe."""

    def __init__(self, call: Callable[..., Any]) -> None:
        """`call(kind, make, process=)`: sends, and waits for the answer."""
        self._call = call
        self._lock = threading.Lock()
        self._recallings: dict[int, LinuxRecalling] = {}
        self._limits: _Limits = (None, None, None)  # soft, hard, floor: as somebody set them

    def recall(self, nbytes: int, deadline_s: float) -> LinuxRecalling:
        """See `World.recall`."""
        check_bytes(nbytes)
        if not 0 <= deadline_s <= MAX_DEADLINE_S:
            raise InvalidRequest(f"a deadline must be 0 to {MAX_DEADLINE_S:.0f} seconds")
        recalling = LinuxRecalling(nbytes)

        def make(call: int) -> Recall:
            with self._lock:
                self._recallings[call] = recalling
            return Recall(call, nbytes, deadline_s)

        self._call(RecallAnswered, make)
        return recalling

    def budget(self, soft_bytes: int | None, hard_bytes: int | None, floor_bytes: int | None) -> Budget:
        """See `World.budget`."""
        wanted = (soft_bytes, hard_bytes, floor_bytes)
        check_bytes(*(limit for limit in wanted if limit is not None))
        answer: BudgetReported = self._call(BudgetReported, lambda call: SetBudget(call, *wanted))
        with self._lock:
            soft, hard, floor = (
                old if new is None else new for old, new in zip(self._limits, wanted, strict=True)
            )
            self._limits = soft, hard, floor
        return answer.budget

    def set_again(self, process: object) -> None:
        """Give the limits to a fresh process."""
        with self._lock:
            limits = self._limits
        if limits != (None, None, None):
            with contextlib.suppress(FlexServeError):
                self._call(BudgetReported, lambda call: SetBudget(call, *limits), process=process)

    def trace(self, after: int) -> list[str]:
        """See `World.trace`."""
        answer: Traced = self._call(Traced, lambda call: Trace(call, after))
        return answer.lines

    def tell(self, message: RecallAnswered | RecallBegan | RecallEnded) -> None:
        """How a recall goes on."""
        with self._lock:
            recalling = self._recallings.get(message.call)
            if isinstance(message, RecallEnded):
                self._recallings.pop(message.call, None)
        if recalling is None:
            return
        match message:
            case RecallAnswered(_, chosen, later):
                recalling.answer(chosen, later)
            case RecallBegan():
                recalling.first_byte()
            case RecallEnded(_, freed):
                recalling.finish(freed)

    def end_all(self, error: FlexServeError) -> None:
        """The process has ended."""
        with self._lock:
            recallings, self._recallings = list(self._recallings.values()), {}
        for recalling in recallings:
            recalling.fail(error)
