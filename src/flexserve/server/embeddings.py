"""The endpoint /v1/embeddings: OpenAI's body in, one request to the world for each text, OpenAI's object out.

Embeddings are computed one after the other; a client that goes away stops the one that runs and those that wait.
It knows no sockets and no world.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import struct
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from ..core import Finished, Request
from ..errors import EngineFailure, InvalidRequest
from .gate import read_json, send_whole
from .gateway import Gateway
from .stream import AnswerStream
from .wire import parse

MAX_INPUTS = 2048  # OpenAI's
FORMATS = ("float", "base64")


class _Body(msgspec.Struct):
    model: str
    input: str | list[str | int | list[int]]
    encoding_format: str | None = None
    dimensions: int | None = None


@dataclass(frozen=True)
class Wanted:
    """A checked body: one request for each text, in their order."""

    model: str
    requests: tuple[Request, ...]
    as_base64: bool


def decode_embeddings(body: bytes) -> Wanted:
    """The body of /v1/embeddings. Raises `InvalidRequest`."""
    data = parse(body, _Body)
    if data.encoding_format not in (None, *FORMATS):
        raise InvalidRequest(f"encoding_format must be one of {', '.join(FORMATS)}")
    if data.dimensions is not None:
        raise InvalidRequest("dimensions is not supported", hint="leave dimensions out")
    given = data.input
    texts: list[Any] = (
        [given] if isinstance(given, str) or all(isinstance(t, int) for t in given) else list(given)
    )
    if not given or not 1 <= len(texts) <= MAX_INPUTS:
        raise InvalidRequest(f"input must be one text or a list of 1 to {MAX_INPUTS}")
    if any(isinstance(text, int) for text in texts):
        raise InvalidRequest("input must be texts or lists of token ids, not both in one list")
    if any(not text for text in texts):
        raise InvalidRequest("input has an empty text", hint="leave it out: there is nothing to embed")
    identity = "embd-" + secrets.token_hex(12)
    requests = tuple(
        Request(id=f"{identity}-{i}", model=data.model, embed=True, prompt=text)
        if isinstance(text, str)
        else Request(id=f"{identity}-{i}", model=data.model, embed=True, token_ids=tuple(text))
        for i, text in enumerate(texts)
    )
    return Wanted(data.model, requests, data.encoding_format == "base64")


def encode_embeddings(wanted: Wanted, made: list[Finished]) -> bytes:
    """OpenAI's object, with our timings of each text beside it."""
    tokens = sum(finished.timings.prompt_tokens for finished in made)
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(f.embedding).decode() if wanted.as_base64 else numbers(f.embedding),
        }
        for i, f in enumerate(made)
    ]
    return msgspec.json.encode(
        {
            "object": "list",
            "data": data,
            "model": wanted.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "flexserve": {"timings": [f.timings for f in made]},
        }
    )


def numbers(embedding: bytes) -> list[float]:
    """Little-endian float32 as numbers."""
    return list(struct.unpack(f"<{len(embedding) // 4}f", embedding))


class Embeddings:
    """The endpoint: an ASGI application, so that it can watch for the client going away."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._gateway.check_open()
        body = await read_json(scope, receive)
        if body is None:
            return
        wanted = decode_embeddings(body)
        running: list[AnswerStream] = []
        gone = asyncio.Event()
        watch = asyncio.create_task(_watch(receive, running, gone))
        try:
            made: list[Finished] = []
            for request in wanted.requests:
                running[:] = [self._gateway.open(request)]
                event = (await running[0].batch())[-1]
                if gone.is_set():
                    return
                if not isinstance(event, Finished) or not event.embedding:
                    raise EngineFailure("the world answered with text instead of an embedding")
                made.append(event)
            await send_whole(send, encode_embeddings(wanted, made))
        finally:
            watch.cancel()
            for stream in running:
                stream.cancel()


async def _watch(receive: Receive, running: list[AnswerStream], gone: asyncio.Event) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()
    for stream in running:
        stream.cancel()
