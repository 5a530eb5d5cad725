"""A linux world whose secure process is a thread of this one: a test can do what a kernel does to its memory."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from flexserve.core import PAGE_SIZE
from flexserve.engine.template import TemplateZygote
from flexserve.flexmem.arena import Arena, SegmentState
from flexserve.flexmem.uffd import MADV_DONTNEED, advise
from flexserve.worlds.linux import LinuxWorld, secure
from flexserve.worlds.linux import world as world_module
from flexserve.worlds.linux.channel import Channel, Measures, ToNormal, ToSecure
from flexserve.worlds.linux.runner import Runner

from ..world_fixtures import Device, linux_world


class _Ending:
    """What `SecureProcess.popen` is for, of a thread."""

    pid = 0

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread

    def kill(self) -> None:
        """A thread ends with its channel."""

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        return 0


class Inside:
    """In place of `SecureProcess`: the same program behind the same channel."""

    made: list[secure.SecureWorld] = []  # noqa: RUF012 - the newest is what tests look into

    def __init__(self, _hardened: bool, **_: Any) -> None:
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours, ToNormal)
        self._theirs = Channel(theirs, ToSecure)
        thread = threading.Thread(target=self._serve, daemon=True)
        self.popen = _Ending(thread)
        thread.start()

    def _serve(self) -> None:
        class Seen(secure.SecureWorld):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                Inside.made.append(self)

        with pytest.MonkeyPatch.context() as patch, suppress(OSError):
            patch.setattr(secure, "SecureWorld", Seen)
            secure.serve(self._theirs, TemplateZygote(), Measures)

    def end(self) -> str:
        self.channel.shut()
        self.popen.wait(30)
        self.channel.close()
        self._theirs.close()
        return "the test ended it"


@contextmanager
def world_inside(device: Device, **options: Any) -> Iterator[tuple[LinuxWorld, secure.SecureWorld]]:
    """A linux world, and the secure world behind it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world_module, "SecureProcess", Inside)
        with linux_world(device, hardened=False, **options) as world:
            inside = Inside.made.pop()
            yield world, inside
        _stop(inside._runner)
        for model in inside._runner.models().values():
            model.close()


def _stop(runner: Runner) -> None:
    """A process would end now; here its threads go on, and must find nothing to do with models that are closed."""
    runner.settle()
    runner._run = lambda: None  # type: ignore[method-assign]  # events are only kept from now on
    done = threading.Event()
    runner._memory.put(done.set)
    assert done.wait(60)


def arena_of(inside: secure.SecureWorld) -> Arena:
    """Of its only model."""
    (model,) = inside._runner.models().values()
    return model.arena


def kernel_takes(arena: Arena, rng: random.Random) -> int:
    """Do to lazy segments what the kernel does when memory is short; how many lost a page."""
    lost = 0
    for index in arena.segments_in(SegmentState.LAZY):
        with (
            arena._lock
        ):  # the kernel takes a page that is lazy, or leaves one that is not: nothing in between
            if rng.random() < 0.5 and arena.state(index) == SegmentState.LAZY:
                span = arena.span(index)
                page = rng.randrange(span.length // PAGE_SIZE)
                advise(arena.base + span.offset + page * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
                lost += 1
    return lost
