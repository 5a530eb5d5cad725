"""From a blocking world to the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexserve.core import Event, Finished, Request
from flexserve.engine.fake import FakeEngine
from flexserve.errors import EngineFailure
from flexserve.server.gateway import Gateway
from flexserve.server.stream import AnswerStream
from flexserve.worlds.base import Generation
from flexserve.worlds.fake import FakeGeneration, FakeWorld, write_fake_model

REQUEST = Request(id="r", model="demo", prompt="hello")


class SlowToQueue(FakeWorld):
    """A world whose `generate` takes until `go` is set."""

    def __init__(self) -> None:
        super().__init__(FakeEngine(token_s=0.001))
        self.go = threading.Event()
        self.made: list[FakeGeneration] = []

    def generate(self, request: Request) -> FakeGeneration:
        assert self.go.wait(30)
        self.made.append(super().generate(request))
        return self.made[0]


@pytest.fixture
def slow_to_queue(tmp_path: Path) -> Iterator[SlowToQueue]:
    world = SlowToQueue()
    world.start()
    world.register(write_fake_model(tmp_path, "demo"))
    yield world
    world.close()


def test_a_request_cancelled_before_the_world_took_it_is_cancelled_there(slow_to_queue: SlowToQueue) -> None:
    async def story() -> None:
        ended = asyncio.Event()
        stream = AnswerStream(slow_to_queue, REQUEST, lambda _: ended.set())
        stream.cancel()
        slow_to_queue.go.set()
        await ended.wait()

    asyncio.run(asyncio.wait_for(story(), 20))
    assert slow_to_queue.made[0].cancelled


def test_a_slow_queue_does_not_hold_up_the_loop(slow_to_queue: SlowToQueue) -> None:
    async def story() -> str:
        stream = AnswerStream(slow_to_queue, REQUEST, lambda _: None)
        slow_to_queue.go.set()  # reached only if the line above did not wait
        while True:
            last = (await stream.batch())[-1]
            if isinstance(last, Finished):
                return last.text

    assert asyncio.run(asyncio.wait_for(story(), 20)) == "hello"


def test_an_answer_that_just_ends_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def __iter__(self) -> Iterator[Event]:
            return self

        def __next__(self) -> Event:
            raise StopIteration

        def cancel(self) -> None: ...

    def generate(request: Request) -> Generation:
        return Nothing()

    world = FakeWorld()
    monkeypatch.setattr(world, "generate", generate)

    async def story() -> None:
        gateway = Gateway(world)
        world.start()
        gateway.register(write_fake_model(tmp_path, "demo"))
        with pytest.raises(EngineFailure, match="without saying why"):
            await gateway.open(REQUEST).batch()

    asyncio.run(asyncio.wait_for(story(), 20))
    world.close()
