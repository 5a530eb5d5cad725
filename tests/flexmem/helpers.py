"""A small arena, a source of recognisable plaintext, and threads that touch arena memory.

Nothing here reads arena memory while it holds the interpreter lock: a page that is missing would never come.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Callable, Iterable
from typing import ClassVar

from flexserve.core import PAGE_SIZE
from flexserve.errors import FlexServeError
from flexserve.flexmem.arena import Arena, SegmentState, Span
from flexserve.flexmem.source import FetchTimes, Staging
from flexserve.flexmem.uffd import Userfaultfd, libc, resident_pages
from flexserve.sealed.format import Region, RegionKind

libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
libc.memcpy.restype = ctypes.c_void_p
libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.memchr.restype = ctypes.c_void_p

PATIENCE_S = 30.0  # a test that waits longer has failed


def regions(
    embed: tuple[int, int] = (4 * PAGE_SIZE, 9 * PAGE_SIZE - 100),
    body: tuple[int, int] = (8 * PAGE_SIZE, 29 * PAGE_SIZE),
    gap: int = 7 * PAGE_SIZE,
) -> tuple[Region, Region]:
    """EMBED and BODY as (unit, length), with a gap between them; the last segment of each is shorter."""
    (embed_unit, embed_length), (body_unit, body_length) = embed, body
    first = Region(RegionKind.EMBED, embed_unit, 0, embed_length, 0, 1, -(-embed_length // embed_unit))
    return first, Region(
        RegionKind.BODY,
        body_unit,
        first.padded_bytes + gap,
        body_length,
        first.padded_bytes,
        1 + first.segment_count,
        -(-body_length // body_unit),
    )


def indices(parts: Iterable[Region]) -> list[int]:
    return [i for r in parts for i in range(r.first_segment, r.first_segment + r.segment_count)]


class Image:
    """What the arena should hold: no byte of it is zero, and no two pages are alike."""

    def __init__(self, length: int) -> None:
        page = bytes(1 + i % 251 for i in range(PAGE_SIZE))
        self._map = mmap.mmap(-1, length)
        for at in range(0, length, PAGE_SIZE):
            self._map[at : at + PAGE_SIZE] = page
            number = at // PAGE_SIZE
            self._map[at : at + 2] = bytes((1 + number % 255, 1 + number // 255))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def __getitem__(self, at: slice) -> bytes:
        return self._map[at]


class FakeSource:
    """Plaintext from an image. Remembers what it was asked for; `gate` holds every fetch while it is closed, `gates`
    those of single segments.
    """

    def __init__(self, image: Image) -> None:
        self.image = image
        self.gate = threading.Event()
        self.gate.set()
        self.gates: dict[int, threading.Event] = {}
        self.fetched: list[Span] = []
        self.errors: dict[int, BaseException] = {}  # by segment
        self.stagings: set[Staging] = set()

    def fetch(self, span: Span, staging: Staging) -> FetchTimes:
        self.fetched.append(span)
        self.stagings.add(staging)
        assert self.gate.wait(PATIENCE_S)
        assert span.first not in self.gates or self.gates[span.first].wait(PATIENCE_S)
        for index in range(span.first, span.first + span.count):
            if index in self.errors:
                raise self.errors[index]
        staging.plain[: span.length] = self.image[span.offset : span.offset + span.length]
        return FetchTimes(0.0, 0.0)


class Toucher:
    """A thread that reads arena memory, as compute does. `result` waits for it."""

    threads: ClassVar[list[threading.Thread]] = []  # that read since the last `let_go`

    def __init__(self, address: int, length: int = 1) -> None:
        self._out = ctypes.create_string_buffer(length)
        self._thread = threading.Thread(
            target=lambda: libc.memcpy(ctypes.addressof(self._out), address, length), daemon=True
        )
        self.threads.append(self._thread)
        self._thread.start()

    @property
    def waiting(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> bytes:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the page never came"
        return self._out.raw


def let_go(faults: Userfaultfd, address: int, length: int) -> None:
    """Before memory is unmapped, let end who reads it: a test that fails may leave a thread that waits for a page, and
    the fault behind the mapping would end the whole run without a word about the test."""
    faults.zero(address, length)
    for thread in Toucher.threads:
        thread.join(PATIENCE_S)
    Toucher.threads.clear()


def close(arena: Arena, faults: Userfaultfd) -> None:
    """Close an arena that a test which failed may still read."""
    if not arena._closed:
        let_go(faults, arena.base, arena.length)
    arena.close()


def touch(address: int, length: int = 1) -> bytes:
    return Toucher(address, length).result()


def holds(arena: Arena, image: Image, span: Span) -> bool:
    """Whether a span of resident pages has the right content."""
    assert all(resident_pages(arena.base + span.offset, span.length))
    return bool(libc.memcmp(arena.base + span.offset, image.address + span.offset, span.length) == 0)


def eventually(condition: Callable[[], object]) -> None:
    """Wait until something that another thread does has happened."""
    pause = threading.Event()
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never happened"
        pause.wait(0.001)


def place_all(arena: Arena, image: Image) -> None:
    for index in indices(arena.regions):
        span = arena.claim(index, 1)
        if span is not None:
            arena.place(span, image.address + span.offset)


def states(arena: Arena) -> set[SegmentState]:
    return {arena.state(i) for i in indices(arena.regions)}


class RefusedError(FlexServeError):
    """A failure of a test's source."""

    code = "test_refused"
