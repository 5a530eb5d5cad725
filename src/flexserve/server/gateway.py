"""What the server knows: the world, the registered models, the answers in progress. No HTTP here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from ..core import Budget, ModelInfo, Request, WorkflowReport, WorldStatus
from ..errors import Busy, EngineFailure, ModelNotFound, ShuttingDown
from ..worlds.base import ModelSource, Recalled, Recalling, World, check_workflow
from .stream import AnswerStream

MAX_IN_FLIGHT = 64  # each costs a thread; the world has its own, usually lower, bound
STATUS_TIMEOUT_S = 10.0
RECALL_GRACE_S = 10.0  # after its deadline: KV of an open answer is saved, however long it takes

T = TypeVar("T")


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
        if request.next_model is not None:
            self.model(request.next_model)
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
        return await self._ask(self.world.status)

    async def recall(self, nbytes: int, deadline_s: float) -> tuple[Recalling, Recalled]:
        """Take memory back, until all of it is back. Raises `EngineFailure` when that takes too long."""
        self.check_open()
        recalling = await asyncio.to_thread(self.world.recall, nbytes, deadline_s=deadline_s)
        wait_s = deadline_s + RECALL_GRACE_S
        try:
            return recalling, await asyncio.to_thread(recalling.wait, wait_s)
        except TimeoutError:
            raise EngineFailure(
                f"{recalling.chosen_bytes} bytes are chosen and not all back after {wait_s:.0f} s",
                hint="the recall goes on; `flexserve trace` shows what it waits for",
            ) from None

    async def budget(
        self, soft: int | None = None, hard: int | None = None, floor: int | None = None
    ) -> Budget:
        """Bytes, as `World.budget`. Raises `InvalidRequest`, `EngineFailure`."""
        return await self._ask(lambda: self.world.budget(soft, hard, floor))

    async def trace(self, after: int) -> list[str]:
        """As `World.trace`. Raises `EngineFailure`."""
        return await self._ask(lambda: self.world.trace(after))

    async def workflows(self) -> WorkflowReport:
        """As `World.workflows`. Raises `EngineFailure`."""
        return await self._ask(self.world.workflows)

    async def declare_workflow(self, client: str | None, name: str, models: Sequence[str]) -> None:
        """As `World.declare_workflow`, and raises `ModelNotFound` for a step that no model answers."""
        check_workflow(client, name, models)
        for model in models:
            self.model(model)
        await self._ask(lambda: self.world.declare_workflow(client, name, models))

    async def forget_workflows(self, client: str | None, *, anonymous: bool, workflow: str | None) -> int:
        """As `World.forget_workflows`. Raises `EngineFailure`."""
        return await self._ask(
            lambda: self.world.forget_workflows(client, anonymous=anonymous, workflow=workflow)
        )

    async def _ask(self, call: Callable[[], T]) -> T:
        self.check_open()
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                return await asyncio.to_thread(call)
        except TimeoutError:
            raise EngineFailure(f"the secure world did not answer within {STATUS_TIMEOUT_S:.0f} s") from None

    def stop(self) -> None:
        """Take no more requests and end those in flight, each with one clear error."""
        self._stopping = True
        for stream in list(self._streams):
            stream.fail(ShuttingDown("the server was told to stop while it was answering"))
