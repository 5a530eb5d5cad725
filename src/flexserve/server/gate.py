"""What every HTTP request passes first and every error last: hosts, the API key, the size of bodies, errors.

It logs the type of an unexpected error and where it happened, never its message: that may quote a prompt.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import socket
import traceback
from collections.abc import Iterable
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import (
    ApiKeyWrong,
    EngineFailure,
    FlexServeError,
    HostRefused,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    OriginRefused,
    RequestTooLarge,
    RequestTooSlow,
)
from .wire import error_body

MAX_BODY_BYTES = 8 << 20
BODY_TIMEOUT_S = 30.0

log = logging.getLogger("flexserve.server")

Headers = list[tuple[bytes, bytes]]
_COMMON: Headers = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]
JSON: Headers = [(b"content-type", b"application/json"), *_COMMON]
EVENTS: Headers = [(b"content-type", b"text/event-stream; charset=utf-8"), *_COMMON]


class HostRule:
    """Which Host headers are answered.

    A web page can point a name of its own at this server (DNS rebinding), so names are refused, except
    `localhost` and those given; an IP literal cannot be rebound. Bound to loopback, only loopback literals.
    """

    def __init__(self, *, loopback: bool, names: Iterable[str] = ()) -> None:
        own = () if loopback else (socket.gethostname(), socket.getfqdn())
        self._names = {"localhost", *(n.lower() for n in names), *(n.lower() for n in own)}
        self._loopback = loopback

    def check(self, host: bytes) -> None:
        """The Host header. Raises `HostRefused`."""
        if not self._answers_for(host):
            name = host.decode("latin-1")
            raise HostRefused(
                f"this server does not answer for the host {name[:100]!r}",
                hint="use http://127.0.0.1 or http://localhost"
                if self._loopback
                else "use its IP address, or start it with --allow-host NAME",
            )

    def check_origin(self, origin: bytes) -> None:
        """The Origin header, which browsers add to what a page sends elsewhere. Raises `OriginRefused`.

        Without it any web page could make this machine compute, though not read the answers.
        """
        scheme, separator, host = origin.partition(b"://")
        if scheme not in (b"http", b"https") or not separator or not self._answers_for(host):
            raise OriginRefused("a web page of another site may not use this server")

    def _answers_for(self, header: bytes) -> bool:
        host = header.decode("latin-1").strip().lower()
        name = host[1 : host.find("]")] if host.startswith("[") else host.rsplit(":", 1)[0]
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._loopback


class Gate:
    """The outermost ASGI application. `hosts` and `api_key` None: not checked (the admin socket)."""

    def __init__(self, app: ASGIApp, *, hosts: HostRule | None = None, api_key: bytes | None = None) -> None:
        self._app = app
        self._hosts = hosts
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started = False

        async def tracked(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        scope["app"] = self  # makes Starlette's router raise HTTPException instead of answering itself
        more: Headers = []
        try:
            self._check(scope)
            await self._app(scope, receive, tracked)
            return
        except FlexServeError as caught:
            error = caught
        except HTTPException as caught:
            error, more = _from_starlette(caught)
        except Exception as caught:
            where = traceback.extract_tb(caught.__traceback__)[-1]
            log.error("%s at %s:%s", type(caught).__name__, where.filename, where.lineno)
            error = EngineFailure(f"the server failed: {type(caught).__name__}")
        if not started:
            await send_error(send, error, more)

    def _check(self, scope: Scope) -> None:
        headers: Headers = scope["headers"]
        if self._hosts is not None:
            hosts = [value for name, value in headers if name == b"host"]
            self._hosts.check(hosts[0] if len(hosts) == 1 else b"")
            for name, value in headers:
                if name == b"origin":
                    self._hosts.check_origin(value)
        if self._api_key is not None and scope["path"] != "/health":
            given = b"".join(value for name, value in headers if name == b"authorization")
            if not hmac.compare_digest(given, b"Bearer " + self._api_key):
                raise ApiKeyWrong("the API key is missing or wrong")


def _from_starlette(caught: HTTPException) -> tuple[FlexServeError, Headers]:
    """The router's 404 and 405. The path is not repeated: clients put all sorts of things there."""
    if caught.status_code == HTTPStatus.NOT_FOUND:
        return NotFound("there is no such endpoint", hint="docs/api.md lists them"), []
    if caught.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allow = ", ".join(sorted((caught.headers or {}).get("Allow", "").split(", ")))
        error = MethodNotAllowed("this endpoint does not take that HTTP method", hint=f"use {allow}")
        return error, [(b"allow", allow.encode())]
    return InvalidRequest(HTTPStatus(caught.status_code).phrase), []


async def send_error(send: Send, error: FlexServeError, more: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """A whole response."""
    headers = [*JSON, *more]
    if error.http_status == HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.http_status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", b"1"))
    if isinstance(error, RequestTooLarge | RequestTooSlow):
        headers.append((b"connection", b"close"))  # the rest of the body is not wanted
    await send_whole(send, error_body(error), status=error.http_status, headers=headers)


async def send_whole(send: Send, body: bytes, *, status: int = 200, headers: Headers = JSON) -> None:
    """A whole response."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


async def read_json(
    scope: Scope, receive: Receive, *, limit: int = MAX_BODY_BYTES, timeout_s: float = BODY_TIMEOUT_S
) -> bytes | None:
    """The body, at most `limit` bytes and `timeout_s` late; None when the client went away.

    Whatever its content type, it is read as JSON. Raises `RequestTooLarge`, `RequestTooSlow`.
    """
    headers = dict(scope["headers"])
    too_large = RequestTooLarge(f"the request body is larger than {limit} bytes")
    declared = headers.get(b"content-length", b"0")
    if not declared.isdigit() or len(declared) > 18 or int(declared) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise too_large
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise RequestTooSlow(f"the request body did not arrive within {timeout_s:.0f} s") from None
