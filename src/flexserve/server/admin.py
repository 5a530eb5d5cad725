"""What only the admin socket answers: `ps`, `list`, and the verbs about memory. The socket's permissions are its
authentication.

Knows HTTP bodies and the gateway; the memory itself is the world's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..core import Budget
from ..errors import InvalidRequest
from .bodies import BudgetBody, RecallAnswer, RecallBody, Trace
from .gate import read_json, send_whole
from .gateway import Gateway

MAX_BYTES = 1 << 60  # more than any machine has: "all"
MAX_DEADLINE_S = 600.0
_MAX_BODY_BYTES = 4096

T = TypeVar("T")


def admin_routes(gateway: Gateway) -> list[Route]:
    """Beside the API's own."""

    async def ps(_: HttpRequest) -> Response:
        return json_response(await gateway.status())

    async def list_models(_: HttpRequest) -> Response:
        return json_response({"models": [info for info, _ in gateway.models.values()]})

    async def trace(request: HttpRequest) -> Response:
        after = request.query_params.get("after", "0")
        if not after.isdigit() or len(after) > 18:
            raise InvalidRequest("after must be the number of an event")
        restarts = (await gateway.status()).restarts
        return json_response(Trace(restarts, await gateway.trace(int(after))))

    async def recall(wanted: RecallBody) -> RecallAnswer:
        size = MAX_BYTES if wanted.size_bytes is None else wanted.size_bytes
        _check_size("size_bytes", size)
        if not 0 < wanted.deadline_s <= MAX_DEADLINE_S:
            raise InvalidRequest(f"deadline_s must be above 0 and at most {MAX_DEADLINE_S:.0f}")
        recalling, recalled = await gateway.recall(size, wanted.deadline_s)
        return RecallAnswer(
            asked_bytes=wanted.size_bytes,
            chosen_bytes=recalling.chosen_bytes,
            later_bytes=recalling.later_bytes,
            freed_bytes=recalled.freed_bytes,
            answered_s=recalling.answered_s,
            first_byte_s=recalled.first_byte_s,
            done_s=recalled.done_s,
            budget=(await gateway.status()).budget,
        )

    async def budget(wanted: BudgetBody) -> Budget:
        for name in wanted.__struct_fields__:
            if (size := getattr(wanted, name)) is not None:
                _check_size(name, size)
        return await gateway.budget(wanted.soft_bytes, wanted.hard_bytes, wanted.floor_bytes)

    return [
        Route("/admin/ps", ps, methods=["GET"]),
        Route("/admin/list", list_models, methods=["GET"]),
        Route("/admin/trace", trace, methods=["GET"]),
        Route("/admin/recall", _Posted(RecallBody, recall), methods=["POST"]),
        Route("/admin/budget", _Posted(BudgetBody, budget), methods=["POST"]),
    ]


def json_response(data: Any) -> Response:
    """A whole response, which nobody may keep."""
    headers = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
    return Response(msgspec.json.encode(data), media_type="application/json", headers=headers)


class _Posted(Generic[T]):
    """An ASGI application: the body is read with limits of its own."""

    def __init__(self, cls: type[T], answer: Callable[[T], Awaitable[Any]]) -> None:
        self._cls = cls
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, limit=_MAX_BODY_BYTES)
        if body is None:
            return
        answer = await self._answer(_decode(body, self._cls))
        await send_whole(send, msgspec.json.encode(answer))


def _decode(body: bytes, cls: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=cls)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the request body is not as it should be: {error}") from None


def _check_size(name: str, value: int) -> None:
    if not 0 <= value <= MAX_BYTES:
        raise InvalidRequest(f"{name} must be 0 to {MAX_BYTES}")
