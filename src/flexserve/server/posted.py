"""Small endpoints: a JSON body in, a JSON answer out. Knows HTTP bodies, not what is in them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .gate import read_json, send_whole
from .wire import parse

MAX_BODY_BYTES = 4096

T = TypeVar("T")


def json_response(data: Any) -> Response:
    """A whole response, which nobody may keep."""
    headers = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
    return Response(msgspec.json.encode(data), media_type="application/json", headers=headers)


class Posted(Generic[T]):
    """An ASGI application: the body is read with limits of its own."""

    def __init__(
        self, cls: type[T], answer: Callable[[T], Awaitable[Any]], *, limit: int = MAX_BODY_BYTES
    ) -> None:
        self._cls = cls
        self._answer = answer
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, limit=self._limit)
        if body is None:
            return
        answer = await self._answer(parse(body, self._cls))
        await send_whole(send, msgspec.json.encode(answer))
