"""How the verbs talk to a running server: HTTP over its admin socket.

Knows the admin socket's path and the server's answers, nothing of terminals.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec

from ..core import Event, Finished, FinishReason, ModelInfo, Request, Timings, Token, WorldStatus
from ..errors import EngineFailure, FlexServeError, ServerNotFound, WorldCrashed, by_code
from .listen import check_private, default_admin_path

T = TypeVar("T")


class _ErrorBody(msgspec.Struct):
    code: str
    message: str
    hint: str = ""


class _Error(msgspec.Struct):
    error: _ErrorBody


class _Models(msgspec.Struct):
    models: list[ModelInfo]


class _Details(msgspec.Struct):
    token_ids: tuple[int, ...]
    timings: Timings


class _Delta(msgspec.Struct):
    content: str = ""


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str = ""
    finish_reason: FinishReason | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []  # msgspec copies an empty default
    flexserve: _Details | None = None
    error: _ErrorBody | None = None


class ServerClient:
    """One server, by its admin socket. A context manager.

    Every call raises `ServerNotFound` when none answers there, else the error the server reports.
    """

    def __init__(self, path: Path | None = None) -> None:
        """`path` None: the default one. Raises `ServerNotFound`, and `StorageFailure` when it is not safe."""
        self.path = path or default_admin_path()
        if not os.path.lexists(self.path):
            raise ServerNotFound(f"no FlexServe server has the admin socket {self.path}")
        check_private(self.path.parent)  # else somebody else's program may be listening
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self.path)), base_url="http://localhost", timeout=30
        )

    def __enter__(self) -> ServerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def ps(self) -> WorldStatus:
        return self._get("/admin/ps", WorldStatus)

    def models(self) -> list[ModelInfo]:
        return self._get("/admin/list", _Models).models

    def generate(self, request: Request) -> ServerGeneration:
        """As `World.generate`, but every error comes from the iteration, and the server chooses the id."""
        return ServerGeneration(self._http, self.path, request)

    def _get(self, path: str, cls: type[T]) -> T:
        try:
            response = self._http.get(path)
        except httpx.HTTPError as error:
            raise _unreachable(self.path, error) from None
        _check(response)
        return msgspec.json.decode(response.content, type=cls)


class ServerGeneration:
    """One answer from a server, as `worlds.base.Generation`. Its tokens have no ids (0) until `Finished`."""

    def __init__(self, http: httpx.Client, path: Path, request: Request) -> None:
        self._events = self._read(http, path, request)
        self._cancelled = False
        self._text = ""

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._cancelled:
            self._events.close()  # closes the connection, and with it the server stops computing
            self._cancelled = False
            return Finished(self._text, (), FinishReason.CANCELLED, Timings())
        return next(self._events)

    def cancel(self) -> None:
        """From the iterating thread only."""
        self._cancelled = True

    def _read(self, http: httpx.Client, path: Path, request: Request) -> Generator[Event, None, None]:
        endpoint, body = _body(request)
        try:
            # No limit on reading: a cold start or a queue may take long.
            timeout = httpx.Timeout(30, read=None)
            with http.stream("POST", endpoint, json=body, timeout=timeout) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    _check(response)
                yield from self._parse(response.iter_lines())
        except httpx.HTTPError as error:
            raise _unreachable(path, error) from None

    def _parse(self, lines: Iterator[str]) -> Iterator[Event]:
        for line in lines:
            if not line.startswith("data: {"):
                continue
            chunk = msgspec.json.decode(line[6:], type=_Chunk)
            if chunk.error is not None:
                raise _error(chunk.error)
            for choice in chunk.choices:
                text = choice.delta.content if choice.delta else choice.text
                self._text += text
                if choice.finish_reason is None:
                    if text:
                        yield Token(0, text)
                elif chunk.flexserve is not None:
                    details = chunk.flexserve
                    yield Finished(self._text, details.token_ids, choice.finish_reason, details.timings)
                    return
        raise WorldCrashed("the server ended the answer half-way")


def _body(request: Request) -> tuple[str, dict[str, Any]]:
    sampling = msgspec.to_builtins(request.sampling)
    body: dict[str, Any] = {"model": request.model, "stream": True, **sampling}
    body |= {"max_tokens": request.max_tokens, "stop": list(request.stop), "ignore_eos": request.ignore_eos}
    if request.messages is not None:
        return "/v1/chat/completions", body | {"messages": msgspec.to_builtins(request.messages)}
    prompt = request.prompt if request.prompt is not None else list(request.token_ids or ())
    return "/v1/completions", body | {"prompt": prompt}


def _check(response: httpx.Response) -> None:
    if response.status_code != httpx.codes.OK:
        try:
            body = msgspec.json.decode(response.content, type=_Error).error
        except msgspec.DecodeError:
            raise EngineFailure(f"the server answered with HTTP status {response.status_code}") from None
        raise _error(body)


def _error(body: _ErrorBody) -> FlexServeError:
    return by_code(body.code)(body.message, hint=body.hint)


def _unreachable(path: Path, error: httpx.HTTPError) -> FlexServeError:
    if isinstance(error, httpx.ConnectError):
        return ServerNotFound(f"no FlexServe server answers at the admin socket {path}")
    return EngineFailure(f"the server at {path} stopped answering")
