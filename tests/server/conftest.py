from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from flexserve.engine.fake import FakeEngine, SystemClock
from flexserve.worlds.fake import FakeWorld

from .running import SCRIPTS, Running, serving


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for all tests of a file that leave no trace in it. Its answers take no time."""
    with serving(tmp_path_factory.mktemp("server"), FakeWorld(FakeEngine(SCRIPTS))) as running:
        yield running


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Running]:
    """A server of its own, whose answers take 5 ms per token: long enough to be disturbed."""
    with serving(tmp_path, FakeWorld(FakeEngine(SCRIPTS, clock=SystemClock(), token_s=0.005))) as running:
        yield running


Post = Callable[..., httpx.Response]


@pytest.fixture
def client(shared: Running) -> Iterator[httpx.Client]:
    with shared.client() as client:
        yield client


@pytest.fixture
def chat(client: httpx.Client) -> Post:
    """POST /v1/chat/completions with one user message and these fields."""

    def post(content: object = "greet", **fields: object) -> httpx.Response:
        body = {"model": "demo", "messages": [{"role": "user", "content": content}], **fields}
        return client.post("/v1/chat/completions", json=body)

    return post


@pytest.fixture
def complete(client: httpx.Client) -> Post:
    """POST /v1/completions with this prompt and these fields."""

    def post(prompt: object = "greet", **fields: object) -> httpx.Response:
        return client.post("/v1/completions", json={"model": "demo", "prompt": prompt, **fields})

    return post
