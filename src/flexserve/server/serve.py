"""Runs the HTTP applications on their sockets until a signal, then stops in order.

Order of stopping: no new connection or request, one clear error to every client in flight, the world, the
admin socket. A second signal ends the process at once; the secure world sees its channel close and ends too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from ..normal.manager import MemoryManager
from .app import admin_app, api_app
from .gate import HostRule
from .gateway import Gateway
from .listen import AdminSocket

GRACE_S = 5  # for clients to take their last bytes
MAX_CONNECTIONS = 512  # keeps a flood of connections away from the limit of open files


class Server:
    """One gateway on one TCP socket and, if given, one admin socket. Takes both over and closes them."""

    def __init__(
        self,
        gateway: Gateway,
        sock: socket.socket,
        *,
        hosts: HostRule,
        admin: AdminSocket | None = None,
        api_key: bytes | None = None,
        manager: MemoryManager | None = None,
    ) -> None:
        """`manager` is stopped before the world is closed; it is not closed here."""
        self._gateway = gateway
        self._manager = manager
        self._admin = admin
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listeners = [_Listener(api_app(gateway, hosts=hosts, api_key=api_key), sock)]
        if admin is not None:
            self._listeners.append(_Listener(admin_app(gateway), admin.socket))

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`, SIGTERM or SIGINT; then close the world and the sockets."""
        try:
            asyncio.run(self._run(on_ready))
        finally:
            if self._admin is not None:
                self._admin.close()

    def stop(self) -> None:
        """Begin to stop. From any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._stop)

    async def _run(self, on_ready: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._loop.add_signal_handler(number, self._signalled)
        listeners = self._listeners
        running: asyncio.Future[Any] = asyncio.gather(*(li.serve([li.sock]) for li in listeners))
        ready: asyncio.Future[Any] = asyncio.gather(*(li.ready.wait() for li in listeners))
        await asyncio.wait([running, ready], return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            on_ready()
        try:
            await running
        finally:
            ready.cancel()
            self._gateway.stop()
            if self._manager is not None:
                self._manager.stop()
            await asyncio.to_thread(self._gateway.world.close)

    def _signalled(self) -> None:
        if any(listener.should_exit for listener in self._listeners):
            if self._admin is not None:
                self._admin.close()
            os._exit(1)
        self._stop()

    def _stop(self) -> None:
        self._gateway.stop()
        for listener in self._listeners:
            listener.should_exit = True


class _Listener(uvicorn.Server):
    """uvicorn without its signal handlers and without logs: its access log would name what clients ask."""

    def __init__(self, app: ASGIApp, sock: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self.sock = sock
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield
