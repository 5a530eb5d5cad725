"""Calls to the secure process that wait for their answers. Knows numbers and queues, no process."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ...errors import EngineFailure, FlexServeError
from .channel import ChannelBroken, Progressed

_Answer = TypeVar("_Answer")

CALL_TIMEOUT_S = 300.0


class Calls:
    """Calls in flight, by number. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._inboxes: dict[int, queue.SimpleQueue[Any]] = {}

    def open(self) -> int:
        """The number of a new call, which `wait` must follow."""
        with self._lock:
            number = next(self._numbers)
            self._inboxes[number] = queue.SimpleQueue()
            return number

    def wait(
        self,
        number: int,
        kind: type[_Answer],
        send: Callable[[], None],
        progress: Callable[[int, int], None] | None = None,
    ) -> _Answer:
        """Send the call and wait for its answer. Raises the error that came instead, `EngineFailure`."""
        with self._lock:
            inbox = self._inboxes[number]
        try:
            send()
            while isinstance(answer := inbox.get(timeout=CALL_TIMEOUT_S), Progressed):
                if progress is not None:
                    progress(answer.done, answer.total)
        except queue.Empty:
            raise EngineFailure("the secure world does not answer") from None
        finally:
            with self._lock:
                self._inboxes.pop(number, None)
        if isinstance(answer, FlexServeError):
            raise answer
        if not isinstance(answer, kind):
            raise ChannelBroken(f"the secure world sent {type(answer).__name__} instead of {kind.__name__}")
        return answer

    def reply(self, number: int, answer: Any) -> None:
        """Hand an answer to whoever waits for it; to nobody who does not."""
        with self._lock:
            inbox = self._inboxes.get(number)
        if inbox is not None:
            inbox.put(answer)

    def end_all(self, error: FlexServeError) -> None:
        """Answer all calls in flight with an error."""
        with self._lock:
            inboxes = list(self._inboxes.values())
        for inbox in inboxes:
            inbox.put(error)
