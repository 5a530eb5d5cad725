"""A server on real sockets over the fake world, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from flexserve.engine.fake import Script
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
