"""From a world's blocking iteration to the event loop, one thread per answer.

The thread appends events and wakes the loop once per batch, so a fast model costs the loop one wake-up for
many tokens, and a slow one 20 microseconds each. It knows no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable

from ..core import Event, Finished, Request
from ..errors import EngineFailure, FlexServeError
from ..worlds.base import Generation, World

log = logging.getLogger("flexserve.server")


class AnswerStream:
    """One answer in progress, for one consumer on the event loop.

    `on_end` is called on the loop when the world is done with the request, whether or not anybody listens.
    """

    def __init__(self, world: World, request: Request, on_end: Callable[[AnswerStream], None]) -> None:
        self._world = world
        self._request = request
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._items: deque[Event | FlexServeError] = deque()
        self._ready = asyncio.Event()
        self._wake_scheduled = False
        self._lock = threading.Lock()  # guards the two below
        self._generation: Generation | None = None
        self._cancelled = False
        # A daemon: a world that hangs must not keep the server from ending.
        threading.Thread(target=self._read, name=f"answer-{request.id}", daemon=True).start()

    async def batch(self) -> list[Event]:
        """The events that have come since the last call, at least one; the last one ever is `Finished`.

        Raises the error that ended the answer.
        """
        while not self._items:
            self._ready.clear()
            await self._ready.wait()
        events: list[Event] = []
        while self._items:
            item = self._items.popleft()
            if isinstance(item, FlexServeError):
                if events:  # first hand out what came before it
                    self._items.appendleft(item)
                    break
                raise item
            events.append(item)
        return events

    def cancel(self) -> None:
        """Stop computing soon. Never blocks for long; harmless after the end."""
        with self._lock:
            self._cancelled = True
            generation = self._generation
        if generation is not None:
            generation.cancel()

    def fail(self, error: FlexServeError) -> None:
        """End the answer for its consumer with `error`, now, and stop computing. On the loop only."""
        self._items.clear()
        self._items.append(error)
        self._ready.set()
        self.cancel()

    def _read(self) -> None:
        try:
            generation = self._world.generate(self._request)
            with self._lock:
                self._generation = generation
                cancelled = self._cancelled
            if cancelled:
                generation.cancel()
            last: Event | None = None
            for event in generation:
                self._push(event)
                last = event
            if not isinstance(last, Finished):
                self._push(EngineFailure("the world ended the answer without saying why"))
        except FlexServeError as error:
            self._push(error)
        except Exception as error:
            # The type only: the message may quote the prompt.
            log.error("answer %s failed: %s", self._request.id, type(error).__name__)
            self._push(EngineFailure(f"the world failed: {type(error).__name__}"))
        finally:
            self._call(lambda: self._on_end(self))

    def _push(self, item: Event | FlexServeError) -> None:
        self._items.append(item)
        if not self._wake_scheduled:
            self._wake_scheduled = True
            self._call(self._wake)

    def _wake(self) -> None:
        self._wake_scheduled = False  # before looking at the items: a later push schedules again
        self._ready.set()

    def _call(self, function: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.cancel()
