"""A recall on its way, as the normal side sees it: first the answer, then the end. Knows no messages."""

from __future__ import annotations

import threading
import time

from ...errors import FlexServeError, InvalidRequest
from ..base import Recalled


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
