"""What runs on the other side of template.py's sockets: a nursery, which forks zygotes, which fork a child for each
template. Knows limits and Jinja; what else confines a process is given by who starts it (`Confine`)."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from jinja2.environment import Template

from . import template_env

WALL_LIMIT_S = 2.0
CPU_LIMIT_S = 2
MEMORY_LIMIT = 512 << 20  # beyond what the zygote has
MAX_OUTPUT_CHARS = 8 << 20
MAX_REQUEST_BYTES = 64 << 20  # 4 Mi characters, each up to 6 bytes in JSON, and many messages
COMPILED_TEMPLATES = 16

MAX_DEATHS = 5  # of zygotes within a second: then something is broken for good

for _codec in ("unicode-escape", "utf-16-le"):  # Python imports codecs from files when first used
    codecs.lookup(_codec)


def _nothing() -> None:
    """Confine nothing further."""


@dataclass(frozen=True)
class Confine:
    """What each kind of process does to itself when it has all it needs."""

    nursery: Callable[[], None] = _nothing
    zygote: Callable[[], None] = _nothing
    template: Callable[[], None] = _nothing


_LENGTH = struct.Struct("<I")
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_SAMPLE = "{% for m in messages %}{{ m.role + m['content'] | trim ~ '' }}{% endfor %}{{ messages | tojson }}"


def nursery(control: socket.socket, confine: Confine) -> NoReturn:
    """Fork a zygote, and another when one dies, until the other end is closed. Never returns; runs in the freshly
    forked process.

    A process of its own, since who uses templates has secrets by then, and a fork of it would too.
    """
    gc.freeze()  # nothing of the process we were is ever finalised: it may own descriptors by number
    environment = template_env.TemplateEnvironment()
    try:
        _drop_everything(control.fileno())
        _warm_up(environment)
        confine.nursery()
    except Exception as error:
        with contextlib.suppress(OSError):  # its client went away
            control.send(str(error).encode()[:200])
        os._exit(2)
    gc.freeze()  # children then do not copy the pages of our objects
    deaths: list[float] = []
    while True:
        pid = os.fork()
        if pid == 0:
            try:
                _zygote(control, environment, confine, is_first=not deaths)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        deaths = [*deaths[-MAX_DEATHS:], time.monotonic()]
        ended = os.WIFEXITED(status) and os.WEXITSTATUS(status) in (0, 2)
        broken = len(deaths) > MAX_DEATHS and deaths[-1] - deaths[0] < 1.0
        if ended or broken or _hung_up(control):
            os._exit(0)


def _hung_up(control: socket.socket) -> bool:
    poll = select.poll()
    poll.register(control, 0)
    return bool(poll.poll(0))


def _zygote(
    control: socket.socket, environment: template_env.TemplateEnvironment, confine: Confine, *, is_first: bool
) -> NoReturn:
    """Serve requests until the other end is closed."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # nobody would start another
        size = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)  # afterwards no file can be opened
        confine.zygote()
        if is_first:
            control.send(b"ready")
    except Exception as error:
        with contextlib.suppress(OSError):  # its client went away
            control.send(str(error).encode()[:200])
        os._exit(2)

    def limited() -> None:
        _limit(size)
        confine.template()

    compiled: OrderedDict[bytes, Template] = OrderedDict()
    children: dict[int, float] = {}
    control.settimeout(1.0)
    while True:
        try:
            message, descriptors, _, _ = socket.recv_fds(control, 64, 4)
        except TimeoutError:
            _reap(children)
            continue
        except OSError:
            os._exit(0)
        if not message:
            os._exit(0)
        _reap(children)
        connection = socket.socket(fileno=descriptors[0])
        digest = message[1:]
        if message[:1] == b"P":
            _prepare(connection, environment, compiled, digest, limited)
        else:
            template = compiled.get(digest)
            if template is not None:
                compiled.move_to_end(digest)
            pid = _fork(connection, control, partial(_render, template=template), limited)
            children[pid] = time.monotonic()
        connection.close()


def _drop_everything(keep: int) -> None:
    """No descriptor but `keep`, no core, no ptrace, no signal handlers of the process we were."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; we end with our client
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        if standard != keep:
            os.dup2(null, standard)
    first = 3
    if keep >= first:
        os.closerange(first, keep)
        first = keep + 1
    os.closerange(first, max(first, os.sysconf("SC_OPEN_MAX")))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_DUMPABLE, 0), (_PR_SET_NO_NEW_PRIVS, 1)):
        if libc.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


def _warm_up(environment: template_env.TemplateEnvironment) -> None:
    """Import and cache whatever a rendering needs: children cannot open files. Check our changes to Jinja."""
    message = {"role": "user", "content": " <|x|> "}
    template = environment.compile_template("<|x|>" + _SAMPLE)
    spans = template_env.render(
        template, [message], bos="", eos="", add_generation_prompt=True, max_chars=1000
    )
    expected = ["<|x|>user", '<|x|>[{"role": "user", "content": " <|x|> "}]']
    if [s.text for s in spans] != expected or [s.is_template for s in spans] != [True, False]:
        raise RuntimeError("this version of Jinja compiles templates in another way")
    time.strftime("%d %b %Y")
    json.loads(json.dumps({"é": [1, True, None, 0.5]}))


def _reap(children: dict[int, float]) -> None:
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            children.clear()
            return
        if pid == 0:
            break
        children.pop(pid, None)
    for pid, started in children.items():
        if time.monotonic() - started > 2 * WALL_LIMIT_S:  # it disabled its own limit
            os.kill(pid, signal.SIGKILL)


def _fork(
    connection: socket.socket,
    control: socket.socket | None,
    work: Callable[[socket.socket], dict[str, Any]],
    limit: Callable[[], None],
) -> int:
    """Do `work` in a child that calls `limit` first, and sends what it returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if control is not None:
            control.close()
        limit()
        try:
            answer = work(connection)
        except MemoryError:
            answer = {"error": f"it needed more than {MEMORY_LIMIT >> 20} MiB"}
        except template_env.RefusedError as error:
            answer = {"error": str(error)}
        _send(connection, answer)
        code = 0
    except MemoryError:
        _send(connection, {"error": f"it needed more than {MEMORY_LIMIT >> 20} MiB"})
    finally:
        os._exit(code)


def _limit(statm: int) -> None:
    """`statm`: a descriptor of the zygote's /proc/PID/statm, whose size a fresh child has too."""
    signal.setitimer(signal.ITIMER_REAL, WALL_LIMIT_S)
    used = int(os.pread(statm, 64, 0).split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT, used + MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    sys.setrecursionlimit(1000)


def _prepare(
    connection: socket.socket,
    environment: template_env.TemplateEnvironment,
    compiled: OrderedDict[bytes, Template],
    digest: bytes,
    limit: Callable[[], None],
) -> None:
    """Compile a template, in a child first: what ended well there under limits may be repeated here."""
    try:
        connection.settimeout(WALL_LIMIT_S)
        source = json.loads(_receive(connection))["template"]
    except (OSError, ValueError):
        return  # its client went away

    def trial(_: socket.socket) -> dict[str, Any]:
        environment.compile_template(source)
        return {"ready": True}

    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = _fork(theirs, None, trial, limit)
        os.waitpid(pid, 0)
        theirs.close()
        try:
            answer = json.loads(_receive(ours))
        except (OSError, ValueError):
            answer = {"error": f"compiling it took longer than {WALL_LIMIT_S:g} s"}
    if answer.get("ready") is True:
        compiled[digest] = environment.compile_template(source)
        while len(compiled) > COMPILED_TEMPLATES:
            compiled.popitem(last=False)
    try:
        _send(connection, answer)
    except OSError:
        return  # its client went away


def _render(connection: socket.socket, template: Template | None) -> dict[str, Any]:
    request = json.loads(_receive(connection))
    if template is None:
        return {"unknown": True}
    spans = template_env.render(
        template,
        request["messages"],
        bos=request["bos"],
        eos=request["eos"],
        add_generation_prompt=request["add_generation_prompt"],
        max_chars=MAX_OUTPUT_CHARS,
    )
    return {"spans": [(span.text, span.is_template) for span in spans]}


def _receive(connection: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    if length > MAX_REQUEST_BYTES:
        raise ValueError("the request is too long")
    return _exactly(connection, length)


def _exactly(connection: socket.socket, count: int) -> bytes:
    buffer = bytearray()
    while len(buffer) < count:
        piece = connection.recv(min(1 << 20, count - len(buffer)))
        if not piece:
            raise ValueError("the request ended early")
        buffer += piece
    return bytes(buffer)


def _send(connection: socket.socket, answer: dict[str, Any]) -> None:
    body = json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")
    connection.sendall(_LENGTH.pack(len(body)) + body)
