"""What the server knows: the world, the registered models, the answers in progress. No HTTP here."""

from __future__ import annotations

import asyncio
import time

from ..core import ModelInfo, Request, WorldStatus
from ..errors import Busy, EngineFailure, ModelNotFound, ShuttingDown
from ..worlds.base import ModelSource, World
from .stream import AnswerStream

MAX_IN_FLIGHT = 64  # each costs a thread; the world has its own, usually lower, bound
STATUS_TIMEOUT_S = 10.0


class Gateway:
    """One per server. `register` and `close` block; everything else belongs on the event loop."""

    def __init__(self, world: World, *, max_in_flight: int = MAX_IN_FLIGHT) -> None:
        self.world = world
        self.models: dict[str, tuple[ModelInfo, int]] = {}  # with the Unix time of registration
        self._max_in_flight = max_in_flight
        self._streams: set[AnswerStream] = set()
        self._stopping = False

    def register(self, source: ModelSource) -> ModelInfo:
        """Make a model answer. Raises what `World.register` raises."""
        info = self.world.register(source)
        self.models[source.name] = (info, int(time.time()))
        return info

    def model(self, name: str) -> tuple[ModelInfo, int]:
        """Raises `ModelNotFound`."""
        if name not in self.models:
            raise ModelNotFound(f"no model {name[:128]!r} is registered")
        return self.models[name]

    def open(self, request: Request) -> AnswerStream:
        """Start answering; most errors come from the stream.

        Raises `ModelNotFound`, `Busy`, `ShuttingDown`.
        """
        self.check_open()
        self.model(request.model)
        if len(self._streams) >= self._max_in_flight:
            raise Busy(f"{len(self._streams)} requests are in flight already")
        stream = AnswerStream(self.world, request, self._streams.discard)
        self._streams.add(stream)
        return stream

    def check_open(self) -> None:
        """Raises `ShuttingDown` once `stop` was called."""
        if self._stopping:
            raise ShuttingDown("the server is stopping")

    async def status(self) -> WorldStatus:
        """Raises `EngineFailure` when the secure world does not answer in time."""
        self.check_open()
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                return await asyncio.to_thread(self.world.status)
        except TimeoutError:
            raise EngineFailure(f"the secure world did not answer within {STATUS_TIMEOUT_S:.0f} s") from None

    def stop(self) -> None:
        """Take no more requests and end those in flight, each with one clear error."""
        self._stopping = True
        for stream in list(self._streams):
            stream.fail(ShuttingDown("the server was told to stop while it was answering"))
