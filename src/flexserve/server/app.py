"""The HTTP applications: OpenAI's API for clients, and the same plus admin.py's endpoints for the admin socket.

One request from socket to token: `Gate` (host, key) -> `Answers` -> `read_json` -> `wire.decode_*` ->
`Gateway.open` -> the world; back: `AnswerStream.batch` -> `wire.Shape` -> send.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from .. import __version__
from ..core import Event, Finished
from ..errors import FlexServeError
from .admin import admin_routes
from .bodies import WorkflowBody, WorkflowDeclared
from .embeddings import Embeddings
from .gate import EVENTS, Gate, HostRule, read_json, send_whole
from .gateway import Gateway
from .posted import Posted, json_response
from .stream import AnswerStream
from .wire import Shape, Wanted, decode_chat, decode_completion, model_object

MAX_WORKFLOW_BODY = 16 << 10


def api_app(gateway: Gateway, *, hosts: HostRule | None, api_key: bytes | None = None) -> Gate:
    """What listens on TCP."""
    return Gate(Router(_api_routes(gateway), redirect_slashes=False), hosts=hosts, api_key=api_key)


def admin_app(gateway: Gateway) -> Gate:
    """What listens on the admin socket."""
    return Gate(Router([*admin_routes(gateway), *_api_routes(gateway)], redirect_slashes=False))


def _api_routes(gateway: Gateway) -> list[Route]:
    async def models(_: HttpRequest) -> Response:
        data = [model_object(info, created) for info, created in gateway.models.values()]
        return json_response({"object": "list", "data": data})

    async def model(request: HttpRequest) -> Response:
        return json_response(model_object(*gateway.model(request.path_params["name"])))

    async def health(_: HttpRequest) -> Response:
        status = await gateway.status()
        return json_response(
            {
                "status": "ok",
                "version": __version__,
                "world": status.world,
                "models": list(gateway.models),
                "active_requests": status.active_requests,
                "waiting_requests": status.waiting_requests,
            }
        )

    async def declare(body: WorkflowBody) -> WorkflowDeclared:
        await gateway.declare_workflow(body.client, body.name, body.steps)
        return WorkflowDeclared("flexserve.workflow", body.name, body.steps, body.client)

    return [
        Route("/health", health, methods=["GET"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", model, methods=["GET"]),
        Route("/v1/chat/completions", Answers(gateway, decode_chat), methods=["POST"]),
        Route("/v1/completions", Answers(gateway, decode_completion), methods=["POST"]),
        Route("/v1/embeddings", Embeddings(gateway), methods=["POST"]),
        Route(
            "/flexserve/v1/workflows",
            Posted(WorkflowBody, declare, limit=MAX_WORKFLOW_BODY),
            methods=["POST"],
        ),
    ]


class Answers:
    """The endpoint of a prompt: an ASGI application, so that it can watch for the client going away."""

    def __init__(self, gateway: Gateway, decode: Callable[[bytes], Wanted]) -> None:
        self._gateway = gateway
        self._decode = decode

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._gateway.check_open()
        body = await read_json(scope, receive)
        if body is None:
            return
        wanted = self._decode(body)
        stream = self._gateway.open(wanted.request)
        watch = asyncio.create_task(_cancel_when_gone(receive, stream))
        try:
            # Before any header: an error that comes instead of a first token keeps its HTTP status.
            events = await stream.batch()
            if wanted.stream:
                await _send_stream(send, stream, Shape(wanted), events)
            else:
                while not isinstance(events[-1], Finished):
                    events = await stream.batch()
                await send_whole(send, Shape(wanted).whole(events[-1]))
        finally:
            watch.cancel()
            stream.cancel()


async def _cancel_when_gone(receive: Receive, stream: AnswerStream) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.cancel()


async def _send_stream(send: Send, stream: AnswerStream, shape: Shape, events: list[Event]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
    out = [shape.first()]
    sent = 0  # characters
    try:
        while True:
            for event in events:
                if isinstance(event, Finished):
                    if len(event.text) > sent:  # what was held back for a stop string that never came
                        out.append(shape.piece(event.text[sent:]))
                    out.append(shape.last(event))
                    await send({"type": "http.response.body", "body": b"".join(out)})
                    return
                if event.text:
                    sent += len(event.text)
                    out.append(shape.piece(event.text))
            await send({"type": "http.response.body", "body": b"".join(out), "more_body": True})
            out = []
            events = await stream.batch()
    except FlexServeError as error:
        await send({"type": "http.response.body", "body": shape.error(error)})
