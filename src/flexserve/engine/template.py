"""Chat templates, rendered in processes that have nothing to lose and nothing to leak.

A template is a program that came with the model. It runs in a child of the *zygote*, a process forked before
keys, threads and llama.cpp exist: so neither ever holds a secret but the one conversation being rendered.
Both are not dumpable, leave no core, and have no descriptor but the socket to their client. A child may use
2 s of time, 2 s of CPU, 512 MiB, and no file at all; it answers once and ends. The zygote keeps compiled
templates, each compiled in a limited child first. Its parent, the *nursery*, forks another when it dies.

Which limit was exceeded is in the `TemplateFailure`. How client text is kept from becoming control tokens:
marked.py and spans.py.

Protocol, ours on both ends: the zygote's socket (SEQPACKET) takes `P` or `R` and the template's digest, with
a stream socket as ancillary data; on that follow one JSON request and one JSON answer, each after its length.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from ..core import Message
from ..errors import EngineFailure, TemplateFailure
from . import template_process
from .spans import ControlToken, ControlTokens, Span

__all__ = ["ControlToken", "ControlTokens", "Span", "TemplateZygote"]

_LENGTH = struct.Struct("<I")
_REPLY_LIMIT = 8 * template_process.MAX_OUTPUT_CHARS  # in JSON a character takes up to 6 bytes
_PATIENCE_S = template_process.WALL_LIMIT_S + 3.0  # past its own limit a child is stuck, not slow
_START_S = 10.0
_KNOWN_TEMPLATES = 64
_RETRY_S = 30.0  # a template that failed may have met a busy machine


class TemplateZygote:
    """Renders chat templates. Start it first thing in the process; `render` may be called from any thread."""

    def __init__(self, confine: template_process.Confine | None = None) -> None:
        """`confine`: what the processes do to themselves besides."""
        self._confine = confine or template_process.Confine()
        self._socket: socket.socket | None = None
        self._pid = 0
        self._lock = threading.Lock()
        # digest: when it was compiled, and why it could not be
        self._known: OrderedDict[bytes, tuple[float, str | None]] = OrderedDict()

    def start(self) -> None:
        """Fork the nursery. Call it before there are threads, keys or a loaded model.

        Raises `EngineFailure`.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                template_process.nursery(theirs, self._confine)
            finally:
                os._exit(1)
        theirs.close()
        self._socket, self._pid = ours, pid
        ours.settimeout(_START_S)
        try:
            state = ours.recv(256)
        except TimeoutError:
            state = b"it does not answer"
        if state != b"ready":
            os.kill(pid, signal.SIGKILL)
            self.close()
            reason = state.decode("utf-8", "replace") or "it ended"
            raise EngineFailure(f"the template process could not start: {reason}")
        ours.settimeout(_PATIENCE_S)

    def close(self) -> None:
        """End the zygote; may be called twice. Renderings in flight fail with `EngineFailure`."""
        if self._socket is None:
            return
        self._socket.close()
        self._socket = None
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    def __enter__(self) -> TemplateZygote:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._pid

    def render(
        self,
        template: str,
        messages: Sequence[Message],
        *,
        bos: str,
        eos: str,
        add_generation_prompt: bool = True,
    ) -> tuple[Span, ...]:
        """The prompt for a conversation, in order, cut where template text and client text meet.

        Raises `TemplateFailure` with the reason or the limit, `EngineFailure` when the zygote is gone.
        """
        digest = hashlib.sha256(template.encode("utf-8", "replace")).digest()
        request = {
            "messages": [{"role": m.role, "content": _well_formed(m.content)} for m in messages],
            "bos": _well_formed(bos),
            "eos": _well_formed(eos),
            "add_generation_prompt": add_generation_prompt,
        }
        for _ in range(3):  # the zygote may have dropped the template meanwhile
            self._prepare(digest, template)
            answer = self._ask(b"R" + digest, request)
            if not answer.get("unknown"):
                break
            with self._lock:
                self._known.pop(digest, None)
        if "spans" not in answer:
            raise TemplateFailure(f"the model's chat template failed: {_reason(answer)}")
        spans = answer["spans"]
        if not isinstance(spans, list) or not all(
            isinstance(s, list) and len(s) == 2 and isinstance(s[0], str) and isinstance(s[1], bool)
            for s in spans
        ):
            raise EngineFailure("the template process gave an answer that makes no sense")
        return tuple(Span(_well_formed(text), is_template) for text, is_template in spans)

    def _prepare(self, digest: bytes, template: str) -> None:
        """Have the zygote compile a template it does not know yet."""
        with self._lock:
            when, problem = self._known.get(digest, (0.0, "not compiled yet"))
            now = time.monotonic()
            if problem is not None and (not when or now - when > _RETRY_S):
                answer = self._ask(b"P" + digest, {"template": _well_formed(template)})
                problem = None if answer.get("ready") is True else _reason(answer)
                self._known[digest] = now, problem
            self._known.move_to_end(digest)
            while len(self._known) > _KNOWN_TEMPLATES:
                self._known.popitem(last=False)
        if problem is not None:
            raise TemplateFailure(f"the model's chat template failed: {problem}")

    def _ask(self, head: bytes, request: dict[str, Any]) -> dict[str, Any]:
        zygote = self._socket
        if zygote is None:
            raise EngineFailure("the template process is not running")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        started = time.monotonic()
        reply = b""
        with ours:
            try:
                with theirs:
                    socket.send_fds(zygote, [head], [theirs.fileno()])
            except OSError as error:
                raise _gone() from error
            try:
                ours.settimeout(_PATIENCE_S)
                body = json.dumps(request, ensure_ascii=False).encode()
                ours.sendall(_LENGTH.pack(len(body)) + body)
                reply = _read_reply(ours)
            except OSError:  # its process ended, or is stuck
                reply = b""
        if not reply:
            if _hung_up(zygote):
                raise _gone()
            return {"error": _limit_by_time(time.monotonic() - started)}
        try:
            answer = json.loads(reply)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise EngineFailure("the template process gave an answer that makes no sense")
        return answer


def _gone() -> EngineFailure:
    return EngineFailure("the template process has ended", hint="restart the server")


def _hung_up(zygote: socket.socket) -> bool:
    poll = select.poll()
    poll.register(zygote, 0)
    return bool(poll.poll(0))


def _limit_by_time(elapsed_s: float) -> str:
    limit = template_process.WALL_LIMIT_S
    return f"it took longer than {limit:g} s" if elapsed_s >= 0.9 * limit else "its process was killed"


def _read_reply(connection: socket.socket) -> bytes:
    head = _read(connection, _LENGTH.size)
    if len(head) < _LENGTH.size:
        return b""
    (length,) = _LENGTH.unpack(head)
    if length > _REPLY_LIMIT:
        return b""
    body = _read(connection, length)
    return body if len(body) == length else b""


def _read(connection: socket.socket, count: int) -> bytes:
    buffer = bytearray()
    while len(buffer) < count and (piece := connection.recv(min(1 << 20, count - len(buffer)))):
        buffer += piece
    return bytes(buffer)


def _reason(answer: dict[str, Any]) -> str:
    reason = answer.get("error")
    return reason[:1000] if isinstance(reason, str) else "no reason given"


def _well_formed(text: str) -> str:
    """Lone surrogates, which JSON can carry and UTF-8 cannot, become U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
