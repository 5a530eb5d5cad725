"""One answer on its way from the secure process to whoever asked."""

from __future__ import annotations

import queue
from collections.abc import Callable

from ...core import Event, Token
from ...errors import FlexServeError


class LinuxGeneration:
    """One answer in progress (`worlds.base.Generation`)."""

    def __init__(self, request_id: str, cancel: Callable[[str], None]) -> None:
        self._id = request_id
        self._cancel = cancel
        self._items: queue.SimpleQueue[Event | FlexServeError] = queue.SimpleQueue()
        self._ended = False

    def __iter__(self) -> LinuxGeneration:
        return self

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        item = self._items.get()
        self._ended = not isinstance(item, Token)
        if isinstance(item, FlexServeError):
            raise item
        return item

    def cancel(self) -> None:
        self._cancel(self._id)

    def push(self, item: Event | FlexServeError) -> None:
        """For the world only."""
        self._items.put(item)
