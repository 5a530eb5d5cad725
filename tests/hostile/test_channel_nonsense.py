"""Attack: nonsense on the channel, from either side. The secure world ends or refuses, it never acts on it; the normal
world gives its callers a clear error and goes on."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from flexserve.core import Finished, FinishReason, ModelInfo, Request, Timings, WorldStatus
from flexserve.errors import FlexServeError
from flexserve.worlds.base import ModelSource
from flexserve.worlds.linux import LinuxWorld, calls
from flexserve.worlds.linux import channel as messages
from flexserve.worlds.linux import world as world_module
from flexserve.worlds.linux.channel import Channel, Failed, ToNormal, ToSecure
from flexserve.worlds.linux.process import SecureProcess

from ..world_fixtures import Device, linux_world

PATIENCE_S = 30.0
START_S = 120.0  # for a process to start, or to see that it must not, on a busy machine


def frame(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def encoded(*parts: Any) -> bytes:
    return frame(msgspec.msgpack.encode(parts))


DEEP = b"\x91" * 200_000 + b"\xc0"
HUGE_ARRAY = b"\xdd\xff\xff\xff\xff"
NONSENSE = {
    "zeros": bytes(4096),
    "random": random.Random(3).randbytes(100_000),
    "no end": struct.pack("<I", 1000) + b"x",
    "an empty frame": frame(b""),
    "too long": struct.pack("<I", (64 << 20) + 1),
    "no message": frame(msgspec.msgpack.encode({"a": 1})),
    "an unknown message": encoded("Format", "/dev/sda"),
    "too few fields": encoded("Status"),
    "too many fields": encoded("Status", 1, 2),
    "a wrong type": encoded("Status", "one"),
    "a number too big": encoded("Recall", 1, 1e300, 1.0),
    "a deadline that is no time": encoded("Recall", 1, 1, float("nan")),
    "a deadline that never comes": encoded("Recall", 1, 1, float("inf")),
    "a name too long": encoded("Cancel", "x" * 5000),
    "bad UTF-8": frame(b"\x92\xa6Cancel\xa2\xff\xfe"),
    "deep nesting": frame(DEEP),
    "deep nesting inside": frame(b"\x92\xa8Generate" + DEEP),
    "an endless array": frame(HUGE_ARRAY),
    "an endless array inside": frame(b"\x92\xa8Generate" + HUGE_ARRAY),
    "an impossible request": encoded("Generate", {"id": "", "model": "m"}),
    "Python": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("what", NONSENSE)
def test_a_channel_refuses_what_is_no_message(what: str) -> None:
    """Both ends decode with this."""
    for incoming in (ToSecure, ToNormal):
        ours, theirs = socket.socketpair()
        channel = Channel(ours, incoming)
        writer = threading.Thread(target=lambda s=theirs: (s.sendall(NONSENSE[what]), s.close()), daemon=True)
        writer.start()
        with pytest.raises(messages.ChannelBroken) if what != "no end" else _nothing():
            assert channel.receive() is None
        channel.close()
        writer.join(PATIENCE_S)
        theirs.close()


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_descriptors_nobody_asked_for_are_closed() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours, ToNormal)
    reader, writer = os.pipe()
    socket.send_fds(theirs, [encoded("RecallEnded", 1, 0)], [writer, writer])
    os.close(writer)
    assert channel.receive().freed_bytes == 0
    channel.close()
    theirs.close()
    assert os.read(reader, 1) == b""  # no writer is left
    os.close(reader)


def test_too_many_descriptors_break_the_channel() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours, ToNormal)
    null = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(messages.ChannelBroken):
        for _ in range(30):
            socket.send_fds(theirs, [encoded("RecallEnded", 1, 0)], [null] * 4)
            channel.receive()
    channel.close()
    theirs.close()
    os.close(null)


# A real secure process


class Raw:
    """A secure process and its bare channel."""

    def __init__(self, device: Device) -> None:
        self.process = SecureProcess(True)
        self.channel = self.process.channel
        self.socket = self.channel._sock
        self.socket.settimeout(START_S)
        self._configure = messages.Configure(
            str(device.key_path), None, str(device.vendor_path), "", 1, None, True, True
        )

    def configure(self) -> Raw:
        self.channel.send(self._configure)
        assert isinstance(self.channel.receive(), messages.Ready)
        return self

    def end(self) -> int:
        """Close our side of the channel if the process has not ended by itself; its exit status."""
        self.channel.shut()
        status = self.process.popen.wait(START_S)
        self.channel.close()
        return status


@pytest.mark.parametrize("what", ["random", "too long", "deep nesting inside", "an endless array inside"])
@pytest.mark.parametrize("configured", [False, True])
def test_a_secure_world_that_gets_nonsense_ends_cleanly(device: Device, what: str, configured: bool) -> None:
    raw = Raw(device)
    if configured:
        raw.configure()
    raw.socket.sendall(NONSENSE[what])
    assert raw.channel.receive() is None  # it says nothing and closes
    assert raw.end() == 70


@pytest.mark.parametrize(
    "body",
    [
        encoded("Configure", "/dev/null", None, None, "", 1, None, True, False),
        encoded("Register", 1, "m", b"", None, 3),
    ],
    ids=["configured twice", "descriptors that are not there"],
)
def test_a_secure_world_ends_when_messages_make_no_sense(device: Device, body: bytes) -> None:
    raw = Raw(device).configure()
    raw.socket.sendall(body)
    while raw.channel.receive() is not None:
        pass
    assert raw.end() == 70


def test_a_secure_world_ends_when_two_requests_have_one_id(device: Device, source: ModelSource) -> None:
    raw = Raw(device).configure()
    sealed = os.open(source.sealed, os.O_RDONLY)
    raw.channel.send(messages.Register(1, "m", source.licence.read_bytes(), None, 1), (sealed,))
    os.close(sealed)
    assert isinstance(raw.channel.receive(), messages.Registered)
    request = {"id": "a", "model": "m", "prompt": "x", "max_tokens": 400, "ignore_eos": True}
    raw.socket.sendall(encoded("Generate", request) * 2)
    while raw.channel.receive() is not None:
        pass
    assert raw.end() == 70


def test_a_secure_world_refuses_what_is_no_sealed_model_and_goes_on(
    device: Device, source: ModelSource, tmp_path: Path
) -> None:
    raw = Raw(device).configure()
    licence = source.licence.read_bytes()
    good = os.open(source.sealed, os.O_RDONLY)
    (tmp_path / "empty").touch()
    pipe, other_end = os.pipe()
    wrong = {
        "a pipe": pipe,
        "the other end": other_end,
        "a directory": os.open(tmp_path, os.O_RDONLY),
        "a device": os.open("/dev/zero", os.O_RDONLY),
        "an empty file": os.open(tmp_path / "empty", os.O_RDONLY),
        "write only": os.open(source.sealed, os.O_WRONLY),
        "a socket": socket.socket().detach(),
        "a path": os.open(source.sealed, os.O_PATH),
    }
    for number, (what, fd) in enumerate(wrong.items(), 1):
        raw.channel.send(messages.Register(number, "m", licence, None, 1), (fd,))
        answer = raw.channel.receive()
        assert isinstance(answer, Failed), what
        assert answer.call == number
        assert answer.code != "error"
        os.close(fd)
    raw.channel.send(messages.Register(50, "m", licence, None, 0))
    assert isinstance(raw.channel.receive(), Failed)
    for junk in (b"", b"\0" * 500, licence[:-1], licence + b"\0"):
        raw.channel.send(messages.Register(51, "m", junk, None, 1), (good,))
        assert raw.channel.receive().code == "licence_malformed"
    raw.channel.send(messages.Register(52, "m", licence, b"not a state", 1), (good,))
    assert raw.channel.receive().code == "state_not_authentic"
    raw.channel.send(messages.Cancel("nobody"))
    raw.channel.send(messages.Recall(53, -5, 1.0))
    assert raw.channel.receive() == messages.RecallAnswered(53, 0, 0)
    assert raw.channel.receive() == messages.RecallEnded(53, 0)
    raw.channel.send(messages.SetBudget(55, -1, -1, -1))
    assert raw.channel.receive().code == "invalid_request"
    raw.channel.send(messages.SetBudget(56, None, 1, 2))
    assert raw.channel.receive().code == "invalid_request"
    raw.channel.send(messages.Register(54, "m", licence, None, 2), (good, good))
    assert isinstance(raw.channel.receive(), messages.Registered)
    raw.channel.send(messages.Generate(Request(id="a", model="m", token_ids=(1,), max_tokens=1)))
    while isinstance(answer := raw.channel.receive(), messages.Tokens):
        pass
    assert isinstance(answer, messages.Ended)
    os.close(good)
    assert raw.end() == 0


def test_a_secure_world_whose_channel_closes_ends_even_while_it_answers(
    device: Device, source: ModelSource
) -> None:
    raw = Raw(device).configure()
    with source.sealed.open("rb") as sealed:
        raw.channel.send(messages.Register(1, "m", source.licence.read_bytes(), None, 1), (sealed.fileno(),))
        raw.channel.receive()
    raw.channel.send(messages.Generate(Request(id="a", model="m", token_ids=(1,), ignore_eos=True)))
    raw.channel.receive()
    assert raw.end() in (0, 70)


# A secure process that is none

READY = messages.Ready(b"\1" * 32, "userfaultfd")
INFO = ModelInfo("m", "m", 1, "llama", "Q8_0", 1, 512, 1, False)
STATUS = WorldStatus("linux", 1, 0.0, 0, 0, 0, "userfaultfd")
FINISHED = Finished("", (), FinishReason.STOP, Timings())
Behaviour = Callable[[Channel, Any], None]


def says(*answers: Any) -> Behaviour:
    """Whatever is asked, these messages or bytes."""

    def behave(channel: Channel, _message: Any) -> None:
        for answer in answers:
            if isinstance(answer, bytes):
                channel._sock.sendall(answer)
            else:
                channel.send(answer)

    return behave


class Impostor:
    """In the place of `SecureProcess`: says it is ready, and answers every message as `behave` likes."""

    behave: Behaviour = staticmethod(says())

    def __init__(self, hardened: bool) -> None:
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours, ToNormal)
        self._other = Channel(theirs, ToSecure)
        self.popen = SimpleNamespace(pid=1, kill=lambda: None)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._other.receive()
        self._other.send(READY)
        try:
            while (message := self._other.receive()) is not None:
                type(self).behave(self._other, message)
        except (OSError, FlexServeError):
            pass

    def end(self) -> str:
        self.channel.shut()
        self._thread.join(PATIENCE_S)
        self.channel.close()
        self._other.close()
        return "exit status 0"


def closes(channel: Channel, _message: Any) -> None:
    channel.shut()


IMPOSTORS: dict[str, Behaviour] = {
    **{what: says(data) for what, data in NONSENSE.items() if what != "no end"},
    "closes": closes,
    "ready again": says(READY),
    "an end before the beginning": says(
        messages.Ended("r", FINISHED), messages.Tokens("r", 1, "x"), b"\0" * 99
    ),
}

# Messages that are in order, but not what was asked for: who asked gets an error, the others wait on.
WRONG: dict[str, Behaviour] = {
    "the wrong answer": says(*(messages.Registered(n, INFO, b"") for n in range(1, 9))),
    "another wrong answer": says(*(messages.Traced(n, ["{}"]) for n in range(1, 9))),
    "a third wrong answer": says(*(messages.Reported(n, STATUS) for n in range(1, 9))),
    "an error without a code": says(*(Failed(None, n, "", "", "") for n in range(1, 9))),
}


@pytest.fixture
def world(device: Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[LinuxWorld]:
    monkeypatch.setattr(world_module, "SecureProcess", Impostor)
    monkeypatch.setattr(world_module, "CALL_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(calls, "CALL_TIMEOUT_S", PATIENCE_S)
    made = LinuxWorld(str(device.key_path))
    yield made
    made.close()


@pytest.mark.parametrize("what", [*IMPOSTORS, *WRONG])
def test_callers_get_a_clear_error_from_a_secure_world_that_talks_nonsense(
    world: LinuxWorld,
    source: ModelSource,
    device: Device,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(Impostor, "behave", staticmethod({**IMPOSTORS, **WRONG}[what]))
    world.start()
    world._sources["m"] = source  # as if it had been registered before
    calls: list[Callable[[], Any]] = [
        world.status,
        lambda: world.recall(1).wait(),
        lambda: world.register(source),
    ]
    if what in IMPOSTORS:
        calls.insert(0, lambda: list(world.generate(Request(id="r", model="m", prompt="x"))))
    ends: list[Any] = []

    def work() -> None:
        for call in calls:
            try:
                ends.append(call())
            except FlexServeError as error:
                assert error.code
                ends.append(error)
            except BaseException as error:
                ends.append(error)
                raise

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(4 * PATIENCE_S)
    assert not thread.is_alive(), "a caller waits for ever"
    assert len(ends) == len(calls)
    assert any(isinstance(end, FlexServeError) for end in ends)


def test_a_real_world_recovers_from_a_process_that_was_none(
    device: Device, source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    with linux_world(device) as world:
        world.register(source)
        monkeypatch.setattr(Impostor, "behave", staticmethod(says(NONSENSE["random"])))
        kinds: list[Any] = [SecureProcess, Impostor]

        def started(hardened: bool) -> Any:
            return (kinds.pop() if len(kinds) > 1 else SecureProcess)(hardened)

        monkeypatch.setattr(world_module, "SecureProcess", started)
        assert world._process
        real = world._process.popen
        real.kill()
        real.wait()
        generation = world.generate(Request(id="r", model="m", token_ids=(1,), max_tokens=2, ignore_eos=True))
        try:
            *_, last = generation
        except FlexServeError:
            *_, last = world.generate(
                Request(id="s", model="m", token_ids=(1,), max_tokens=2, ignore_eos=True)
            )
        assert isinstance(last, Finished)
        assert kinds == [SecureProcess]
