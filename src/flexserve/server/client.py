"""How the verbs talk to a running server: HTTP over its admin socket.

Knows the admin socket's path and the server's answers, nothing of terminals.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ..core import (
    Budget,
    Event,
    Finished,
    FinishReason,
    ModelInfo,
    Request,
    Timings,
    Token,
    WorkflowReport,
    WorldStatus,
)
from ..errors import EngineFailure, FlexServeError, ServerNotFound, WorldCrashed, by_code
from .bodies import (
    BudgetBody,
    ForgetBody,
    Forgotten,
    RecallAnswer,
    RecallBody,
    Trace,
    WorkflowBody,
    WorkflowDeclared,
)
from .listen import check_private, default_admin_path

TIMEOUT_S = 30.0

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


class _Embedding(msgspec.Struct):
    embedding: bytes  # base64 in JSON


class _EmbeddingDetails(msgspec.Struct):
    timings: list[Timings]


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]
    flexserve: _EmbeddingDetails


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []  # msgspec copies an empty default
    flexserve: _Details | None = None
    error: _ErrorBody | None = None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class ServerClient:
    """One server, by its admin socket.

    Every call raises `ServerNotFound` when none answers there, else the error the server reports.
    """

    def __init__(self, path: Path | None = None) -> None:
        """`path` None: the default one. Raises `ServerNotFound`, and `StorageFailure` when it is not safe."""
        self.path = path or default_admin_path()
        if not os.path.lexists(self.path):
            raise ServerNotFound(f"no FlexServe server has the admin socket {self.path}")
        check_private(self.path.parent)  # else somebody else's program may be listening

    def ps(self) -> WorldStatus:
        return self._get("/admin/ps", WorldStatus)

    def models(self) -> list[ModelInfo]:
        return self._get("/admin/list", _Models).models

    def generate(self, request: Request) -> ServerGeneration:
        """As `World.generate`, but every error comes from the iteration, and the server chooses the id."""
        return ServerGeneration(self.path, request)

    def recall(self, body: RecallBody) -> RecallAnswer:
        """Returns when everything that was chosen is back."""
        return self._post("/admin/recall", body, RecallAnswer, TIMEOUT_S + body.deadline_s)

    def budget(self, body: BudgetBody) -> Budget:
        return self._post("/admin/budget", body, Budget, TIMEOUT_S)

    def trace(self, after: int = 0) -> Trace:
        return self._get(f"/admin/trace?after={after}", Trace)

    def workflows(self) -> WorkflowReport:
        return self._get("/admin/workflows", WorkflowReport)

    def declare_workflow(self, body: WorkflowBody) -> WorkflowDeclared:
        return self._post("/flexserve/v1/workflows", body, WorkflowDeclared, TIMEOUT_S)

    def forget_workflows(self, body: ForgetBody) -> int:
        """How many are forgotten."""
        return self._post("/admin/workflows/forget", body, Forgotten, TIMEOUT_S).forgotten

    def _get(self, endpoint: str, cls: type[T]) -> T:
        return self._ask("GET", endpoint, None, cls, TIMEOUT_S)

    def _post(self, endpoint: str, body: msgspec.Struct, cls: type[T], timeout_s: float) -> T:
        return self._ask("POST", endpoint, msgspec.json.encode(body), cls, timeout_s)

    def _ask(self, method: str, endpoint: str, content: bytes | None, cls: type[T], timeout_s: float) -> T:
        connection = _UnixConnection(self.path, timeout_s)
        try:
            connection.request(method, endpoint, content)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(self.path, error) from None
        finally:
            connection.close()
        _check(response.status, body)
        return msgspec.json.decode(body, type=cls)


class ServerGeneration:
    """One answer from a server, as `worlds.base.Generation`. Its tokens have no ids (-1) until `Finished`."""

    def __init__(self, path: Path, request: Request) -> None:
        self._path = path
        self._connection = _UnixConnection(path, TIMEOUT_S)
        self._cancelled = False
        self._text = ""
        self._events = self._read(request)

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def cancel(self) -> None:
        """Hang up, which makes the server stop. From any thread or signal handler."""
        self._cancelled = True
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):  # it is closed already
                sock.shutdown(socket.SHUT_RDWR)  # unlike close, wakes a thread that is reading

    def _read(self, request: Request) -> Iterator[Event]:
        try:
            self._connection.connect()
            yield from self._answer(request)
        except (OSError, http.client.HTTPException) as error:
            if not self._cancelled:
                raise _unreachable(self._path, error) from None
        finally:
            self._connection.close()
        if self._cancelled:
            yield Finished(self._text, (), FinishReason.CANCELLED, Timings())

    def _embedding(self, request: Request) -> Iterator[Event]:
        given = request.prompt if request.prompt is not None else list(request.token_ids or ())
        body = {"model": request.model, "input": given, "encoding_format": "base64"}
        self._connection.request("POST", "/v1/embeddings", msgspec.json.encode(body))
        self._connection.sock.settimeout(None)
        response = self._connection.getresponse()
        answer = response.read()
        if self._cancelled:
            return
        _check(response.status, answer)
        made = msgspec.json.decode(answer, type=_Embeddings)
        yield Finished("", (), FinishReason.STOP, made.flexserve.timings[0], made.data[0].embedding)

    def _answer(self, request: Request) -> Iterator[Event]:
        """Ends early when cancelled."""
        if request.embed:
            yield from self._embedding(request)
            return
        endpoint, body = _body(request)
        headers = {"content-type": "application/json"}
        self._connection.request("POST", endpoint, msgspec.json.encode(body), headers)
        self._connection.sock.settimeout(None)  # a cold start or a queue may take long
        response = self._connection.getresponse()
        if response.status != HTTPStatus.OK:
            _check(response.status, response.read())
        while not self._cancelled and (line := response.readline()):
            if not line.startswith(b"data: {"):
                continue
            chunk = msgspec.json.decode(line[6:], type=_Chunk)
            if chunk.error is not None:
                raise _error(chunk.error)
            for choice in chunk.choices:
                text = choice.delta.content if choice.delta else choice.text
                self._text += text
                if choice.finish_reason is None:
                    if text:
                        yield Token(-1, text)
                elif chunk.flexserve is not None:
                    details = chunk.flexserve
                    self._cancelled = False
                    self._connection.close()  # now: nobody may ask for what follows the end
                    yield Finished(self._text, details.token_ids, choice.finish_reason, details.timings)
                    return
        if not self._cancelled:
            raise WorldCrashed("the server ended the answer half-way")


def _body(request: Request) -> tuple[str, dict[str, Any]]:
    sampling = msgspec.to_builtins(request.sampling)
    body: dict[str, Any] = {"model": request.model, "stream": True, **sampling}
    body |= {"max_tokens": request.max_tokens, "stop": list(request.stop), "ignore_eos": request.ignore_eos}
    body["session"] = request.session
    if (request.client, request.next_model, request.priority) != (None, None, 0):
        body["flexserve"] = {
            "client": request.client,
            "next_model": request.next_model,
            "priority": request.priority,
        }
    if request.messages is not None:
        return "/v1/chat/completions", body | {"messages": msgspec.to_builtins(request.messages)}
    prompt = request.prompt if request.prompt is not None else list(request.token_ids or ())
    return "/v1/completions", body | {"prompt": prompt}


def _check(status: int, body: bytes) -> None:
    if status != HTTPStatus.OK:
        try:
            error = msgspec.json.decode(body, type=_Error).error
        except msgspec.DecodeError:
            raise EngineFailure(f"the server answered with HTTP status {status}") from None
        raise _error(error)


def _error(body: _ErrorBody) -> FlexServeError:
    return by_code(body.code)(body.message, hint=body.hint)


def _unreachable(path: Path, error: Exception) -> FlexServeError:
    if isinstance(error, ConnectionRefusedError | FileNotFoundError):
        return ServerNotFound(f"no FlexServe server answers at the admin socket {path}")
    return EngineFailure(f"the server at {path} stopped answering")
