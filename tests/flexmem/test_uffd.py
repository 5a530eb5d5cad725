"""The kernel's side of Flex-Mem, with its awkward answers: partial copies, pages that are there already."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import select
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flexserve.core import PAGE_SIZE
from flexserve.flexmem import uffd
from flexserve.flexmem.uffd import UffdDeniedError, Userfaultfd, libc

from .helpers import PATIENCE_S, Image, Toucher, let_go, touch

PAGES = 8
LENGTH = PAGES * PAGE_SIZE


@pytest.fixture
def area(faults: Userfaultfd) -> Iterator[int]:
    """Address of PAGES missing pages."""
    address = uffd.reserve(LENGTH)
    faults.register(address, LENGTH)
    yield address
    let_go(faults, address, LENGTH)
    uffd.release(address, LENGTH)


@pytest.fixture
def image() -> Image:
    return Image(LENGTH)


def page(area: int, number: int) -> int:
    return area + number * PAGE_SIZE


def next_faults(faults: Userfaultfd) -> list[int]:
    """Wait for at least one."""
    poll = select.poll()
    poll.register(faults.fd, select.POLLIN)
    assert poll.poll(PATIENCE_S * 1000)
    return list(faults.faults())


class Libc:
    """libc, with another ioctl."""

    def __init__(self, ioctl: Callable[[int, int, Any], int]) -> None:
        self.ioctl = ioctl

    def __getattr__(self, name: str) -> Any:
        return getattr(libc, name)


def test_reserved_memory_is_aligned_and_takes_no_page() -> None:
    address = uffd.reserve(LENGTH, align=1 << 21)
    assert address % (1 << 21) == 0
    assert sum(uffd.resident_pages(address, LENGTH)) == 0
    libc.memset(page(address, 3), 1, 1)
    assert uffd.resident_pages(address, LENGTH) == bytes([0, 0, 0, 1, 0, 0, 0, 0])
    uffd.release(address, LENGTH)
    with pytest.raises(OSError, match="mincore"):
        uffd.resident_pages(address, LENGTH)


def test_a_copy_fills_missing_pages_and_leaves_those_that_are_there(
    faults: Userfaultfd, area: int, image: Image
) -> None:
    other = Image(2 * PAGE_SIZE)
    assert faults.copy(page(area, 2), other.address, PAGE_SIZE) == PAGE_SIZE
    assert faults.copy(page(area, 7), other.address, PAGE_SIZE) == PAGE_SIZE
    assert faults.copy(area, image.address, LENGTH) == LENGTH - 2 * PAGE_SIZE
    for number in range(PAGES):
        expected = other[0:PAGE_SIZE] if number in (2, 7) else image[number * PAGE_SIZE :][:PAGE_SIZE]
        assert touch(page(area, number), PAGE_SIZE) == expected


def test_zeros_fill_missing_pages_only(faults: Userfaultfd, area: int, image: Image) -> None:
    faults.copy(page(area, 1), image.address, PAGE_SIZE)
    assert faults.zero(area, LENGTH) == LENGTH - PAGE_SIZE
    assert touch(area, 2 * PAGE_SIZE) == bytes(PAGE_SIZE) + image[0:PAGE_SIZE]


def test_a_copy_that_the_kernel_stops_early_is_continued(
    faults: Userfaultfd, area: int, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def one_page_or_none(fd: int, request: int, arg: Any) -> int:
        """Every other call copies a page and says it stopped; the others stop at once."""
        dst, src, length, mode, _ = struct.unpack_from("<QQQQq", arg)
        calls.append(dst)
        copied = -errno.EAGAIN
        if len(calls) % 2:
            small = ctypes.create_string_buffer(struct.pack("<QQQQq", dst, src, PAGE_SIZE, mode, 0))
            assert libc.ioctl(fd, request, small) == 0
            copied = PAGE_SIZE
            if length == PAGE_SIZE:
                return 0
        struct.pack_into("<q", arg, 32, copied)
        ctypes.set_errno(errno.EAGAIN)
        return -1

    monkeypatch.setattr(uffd, "libc", Libc(one_page_or_none))
    assert faults.copy(area, image.address, LENGTH) == LENGTH
    monkeypatch.undo()
    assert len(calls) == 2 * PAGES - 1
    assert touch(area, LENGTH) == image[0:LENGTH]


def test_a_copy_that_fails_for_good_raises(faults: Userfaultfd, area: int) -> None:
    with pytest.raises(OSError, match="userfaultfd fill"):
        faults.copy(area, 1 << 12, LENGTH)  # no such source


def test_a_thread_waits_for_its_page_and_its_fault_is_reported(
    faults: Userfaultfd, area: int, image: Image
) -> None:
    assert list(faults.faults()) == []
    thread = Toucher(page(area, 3) + 77)
    assert next_faults(faults) == [page(area, 3)]
    assert thread.waiting
    faults.copy(page(area, 3), image.address + 3 * PAGE_SIZE, PAGE_SIZE)
    assert thread.result() == image[3 * PAGE_SIZE + 77 : 3 * PAGE_SIZE + 78]


def test_a_copy_wakes_a_thread_whose_page_somebody_else_has_placed(
    faults: Userfaultfd, area: int, image: Image
) -> None:
    thread = Toucher(page(area, 0))
    next_faults(faults)
    # As another thread would that got there first; mode 1: do not wake anybody.
    quiet = struct.pack("<QQQQq", area, image.address, PAGE_SIZE, 1, 0)
    assert libc.ioctl(faults.fd, 0xC028AA03, ctypes.create_string_buffer(quiet)) == 0
    assert thread.waiting
    assert faults.copy(area, image.address, PAGE_SIZE) == 0
    assert thread.result() == image[0:1]


def test_a_woken_thread_without_a_page_faults_again(faults: Userfaultfd, area: int) -> None:
    thread = Toucher(page(area, 5))
    assert next_faults(faults) == [page(area, 5)]
    faults.wake(area, LENGTH)
    assert next_faults(faults) == [page(area, 5)]
    faults.zero(page(area, 5), PAGE_SIZE)
    assert thread.result() == b"\0"


def test_pages_moved_away_keep_their_content_and_are_missing_where_they_were(
    faults: Userfaultfd, area: int, image: Image
) -> None:
    faults.copy(area, image.address, LENGTH)
    away = uffd.move_away(page(area, 2), 3 * PAGE_SIZE)
    assert uffd.resident_pages(area, LENGTH) == bytes([1, 1, 0, 0, 0, 1, 1, 1])
    assert touch(away, 3 * PAGE_SIZE) == image[2 * PAGE_SIZE : 5 * PAGE_SIZE]
    uffd.release(away, 3 * PAGE_SIZE)
    thread = Toucher(page(area, 2))
    assert next_faults(faults) == [page(area, 2)]  # still registered
    faults.copy(page(area, 2), image.address, PAGE_SIZE)
    thread.result()


def test_a_reader_never_sees_zeros_while_pages_are_moved_away_and_placed_again(
    faults: Userfaultfd, area: int, image: Image
) -> None:
    faults.copy(area, image.address, LENGTH)
    seen: list[int] = []
    rounds = [0]
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            if libc.memchr(area, 0, LENGTH):
                seen.append(1)
            rounds[0] += 1

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        for number in range(2000):
            at = number % (PAGES - 1) * PAGE_SIZE
            away = uffd.move_away(area + at, 2 * PAGE_SIZE)
            libc.memset(away, 0, 2 * PAGE_SIZE)
            uffd.release(away, 2 * PAGE_SIZE)
            faults.copy(area + at, image.address + at, 2 * PAGE_SIZE)
    finally:  # it reads what is unmapped after the test
        stop.set()
        faults.zero(area, LENGTH)
        reader.join(PATIENCE_S)
    assert rounds[0] > 0
    assert not reader.is_alive()
    assert not seen


def test_a_kernel_that_refuses_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Libc):
        def syscall(self, *_: int) -> int:
            ctypes.set_errno(errno.EPERM)
            return -1

    monkeypatch.setattr(uffd, "libc", Refusing(libc.ioctl))
    with pytest.raises(UffdDeniedError, match="Operation not permitted"):
        Userfaultfd()


def test_a_kernel_with_another_api_is_refused_and_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[int] = []

    def refuse(_fd: int, _request: int, _arg: Any) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(uffd, "libc", Libc(refuse))
    monkeypatch.setattr(os, "close", closed.append)
    with pytest.raises(UffdDeniedError, match="UFFDIO_API"):
        Userfaultfd()
    monkeypatch.undo()
    assert len(closed) == 1
    os.close(closed[0])


def test_an_unknown_machine_has_no_userfaultfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "pdp11")
    with pytest.raises(UffdDeniedError, match="pdp11"):
        Userfaultfd()
