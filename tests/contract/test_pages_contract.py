"""What every Flex-Mem keeps to, whoever isolates its pages: the linux world's arena, Flex-Monitor, and its model.

Given pages are held; a recall gives back as many as are asked for and there, with nothing of their content; they can be
given again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from flexserve.core import PAGE_SIZE
from flexserve.flexmem.arena import Arena, SegmentState
from flexserve.flexmem.uffd import Userfaultfd, resident_pages
from flexserve.monitor.abi import MODE_SYNC, Call, Service, State, Status
from flexserve.monitor.model import DRAM_BASE, PAGE, Monitor, Pages

from ..flexmem.helpers import Image, close, regions
from ..monitor.host_build import CALLS, PAGES, HostMonitor, build

COUNT = 8  # pages that the tests give
LIST = DRAM_BASE + (PAGES - 8) * PAGE


class Flex(Protocol):
    """Pages 0 to COUNT - 1."""

    def give(self, pages: list[int]) -> None:
        """They become secure memory, with content."""

    def recall(self, count: int) -> int:
        """How many came back."""

    def held(self) -> set[int]: ...

    def is_empty(self, page: int) -> bool:
        """Whether the operating system has it, without content."""


class ArenaPages:
    """The linux world: a segment is a page, and the kernel is the operating system."""

    def __init__(self, faults: Userfaultfd) -> None:
        half = (PAGE_SIZE, COUNT // 2 * PAGE_SIZE)
        self.arena = Arena(regions(embed=half, body=half), faults)
        self._image = Image(self.arena.length)

    def give(self, pages: list[int]) -> None:
        for page in pages:
            span = self.arena.claim(1 + page, 1)
            assert span is not None
            self.arena.place(span, self._image.address + span.offset)

    def recall(self, count: int) -> int:
        return self.arena.recall([1 + page for page in sorted(self.held())[:count]]) // PAGE_SIZE

    def held(self) -> set[int]:
        return {segment - 1 for segment in self.arena.segments_in(SegmentState.RESIDENT)}

    def is_empty(self, page: int) -> bool:
        address = self.arena.base + self.arena.span(1 + page).offset
        return not resident_pages(address, PAGE_SIZE)[0]


class CodePages:
    """Flex-Monitor's C code, built for this machine."""

    def __init__(self, monitor: HostMonitor) -> None:
        self._c = monitor

    def give(self, pages: list[int]) -> None:
        status, _, ticket, _ = self._c.call(Call.SECURE_CALL, Service.WANT, len(pages))
        assert status == Status.WANT_PAGES
        for number, page in enumerate(pages):
            assert self._c.write(DRAM_BASE + page * PAGE, 0x5EC4E7)
            assert self._c.write(LIST + 8 * number, DRAM_BASE + page * PAGE)
        assert self._c.call(Call.DONATE, LIST, len(pages), ticket)[0] == Status.OK
        assert self._c.wrong() is None

    def recall(self, count: int) -> int:
        status, taken, *_ = self._c.call(Call.RECLAIM, count, MODE_SYNC)
        assert self._c.wrong() is None
        return taken if status == Status.OK else 0

    def held(self) -> set[int]:
        return {page for page in range(COUNT) if self._c.state(DRAM_BASE + page * PAGE) == State.FLEX}

    def is_empty(self, page: int) -> bool:
        return self._c.read(DRAM_BASE + page * PAGE) == (0, 0)


class ModelPages:
    """The page state machine that proofs and exploration use."""

    def __init__(self) -> None:
        self._model = Monitor(Pages(PAGES))

    def give(self, pages: list[int]) -> None:
        status, _, ticket = self._model.want(len(pages))
        assert status == Status.WANT_PAGES
        items = [DRAM_BASE + page * PAGE for page in pages]
        assert self._model.donate(LIST, items, ticket)[0] == Status.OK

    def recall(self, count: int) -> int:
        status, taken = self._model.reclaim(count, MODE_SYNC)
        return taken if status == Status.OK else 0

    def held(self) -> set[int]:
        return {page for page in range(COUNT) if self._state(page) == State.FLEX}

    def is_empty(self, page: int) -> bool:
        return self._state(page) == State.UNPROTECTED

    def _state(self, page: int) -> State | Status:
        return self._model.pages.state(DRAM_BASE + page * PAGE)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        tmp_path_factory.mktemp("monitor") / "libmonitor.so",
        CALLS,
        "-fsanitize=undefined",
        "-shared",
        "-fPIC",
    )


@pytest.fixture(params=["linux arena", "Flex-Monitor", "its model"])
def flex(request: pytest.FixtureRequest) -> Iterator[Flex]:
    if request.param == "linux arena":
        faults = Userfaultfd()
        pages = ArenaPages(faults)
        yield pages
        close(pages.arena, faults)
        faults.close()
    elif request.param == "Flex-Monitor":
        yield CodePages(HostMonitor(request.getfixturevalue("library")))
    else:
        yield ModelPages()


def test_what_is_given_is_held_and_nothing_else(flex: Flex) -> None:
    assert flex.held() == set()
    flex.give([1, 2, 6])
    assert flex.held() == {1, 2, 6}


def test_a_recall_gives_back_what_is_asked_for_and_empty(flex: Flex) -> None:
    flex.give(list(range(COUNT)))
    assert flex.recall(3) == 3
    back = set(range(COUNT)) - flex.held()
    assert len(back) == 3
    assert all(map(flex.is_empty, back))


def test_a_recall_gives_back_no_more_than_there_is(flex: Flex) -> None:
    assert flex.recall(1) == 0
    flex.give([0, 3])
    assert flex.recall(COUNT) == 2
    assert flex.held() == set()
    assert flex.recall(1) == 0


def test_a_page_that_came_back_can_be_given_again(flex: Flex) -> None:
    for _ in range(3):
        flex.give([5])
        assert flex.held() == {5}
        assert flex.recall(1) == 1
        assert flex.is_empty(5)


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_giving_and_recalling_adds_up(flex: Flex, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(60):
        held = flex.held()
        free = sorted(set(range(COUNT)) - held)
        if free and draw.random() < 0.5:
            given = draw.sample(free, draw.randint(1, len(free)))
            flex.give(given)
            assert flex.held() == held | set(given)
        else:
            count = draw.randint(1, COUNT)
            assert flex.recall(count) == min(count, len(held))
            assert flex.held() < held or not held
            assert all(map(flex.is_empty, held - flex.held()))
