"""A server on real sockets over the fake world, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from flexserve.engine.fake import FakeEngine, Script, SystemClock
from flexserve.errors import EngineFailure
from flexserve.server.gate import HostRule
from flexserve.server.gateway import Gateway
from flexserve.server.listen import AdminSocket, listen_tcp, url
from flexserve.server.serve import Server
from flexserve.worlds.fake import FakeWorld, write_fake_model

SCRIPTS = {
    "greet": Script("Guten Morgen, Zoë! 🌅"),
    "fail late": Script("Half an ans", EngineFailure("the engine stopped")),
    "fail early": Script("", EngineFailure("the engine did not start")),
}


@dataclass
class Running:
    """A server that answers, and the world behind it."""

    server: Server
    gateway: Gateway
    world: FakeWorld
    url: str
    admin: Path
    thread: threading.Thread

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **options)

    def admin_client(self) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=str(self.admin))
        return httpx.Client(base_url="http://localhost", transport=transport, timeout=30)

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextmanager
def serving(
    directory: Path, world: FakeWorld, *, api_key: bytes | None = None, max_in_flight: int = 64
) -> Iterator[Running]:
    """Start a server with the model `demo` (context 4096) and stop it afterwards."""
    world.start()
    gateway = Gateway(world, max_in_flight=max_in_flight)
    gateway.register(write_fake_model(directory, "demo"))
    sock = listen_tcp("127.0.0.1", 0)
    address = url(sock)
    private = directory / "private"
    admin = AdminSocket(private / "admin.sock")
    server = Server(gateway, sock, hosts=HostRule(loopback=True), admin=admin, api_key=api_key)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(ready.set,), daemon=True)
    thread.start()
    assert ready.wait(20)
    running = Running(server, gateway, world, address, admin.path, thread)
    try:
        yield running
    finally:
        running.stop()


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
