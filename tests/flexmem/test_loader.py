"""The loader: order, urgency, storms of recalls, failures of everything it depends on."""

from __future__ import annotations

import ctypes
import os
import random
import threading
import time
from collections.abc import Iterator

import pytest

from flexserve.core import PAGE_SIZE
from flexserve.errors import EngineFailure, FlexServeError
from flexserve.flexmem import loader as loader_module
from flexserve.flexmem.arena import Arena, SegmentState
from flexserve.flexmem.loader import Loader
from flexserve.flexmem.uffd import HUGE_PAGE, MADV_DONTNEED, Userfaultfd, advise, libc
from flexserve.framework.effects import Priority
from flexserve.framework.order import Range

from .helpers import (
    PATIENCE_S,
    FakeSource,
    Image,
    RefusedError,
    Toucher,
    close,
    eventually,
    holds,
    indices,
    regions,
    states,
    touch,
)

EVERYTHING = [Range(1, 3), Range(4, 4)]
READERS, STORMS = 4, 400


@pytest.fixture
def source(image: Image) -> FakeSource:
    return FakeSource(image)


@pytest.fixture
def loader(arena: Arena, source: FakeSource, faults: Userfaultfd) -> Iterator[Loader]:
    made = Loader(arena, source, faults, workers=1)
    yield made
    source.gate.set()
    made.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watchdog that looks a hundred times a second."""
    monkeypatch.setattr(loader_module, "WATCH_PERIOD_S", 0.01)


def address(arena: Arena, index: int) -> int:
    return arena.base + arena.span(index).offset


# Order


def test_a_plan_is_loaded_in_its_order_and_completely(
    loader: Loader, arena: Arena, source: FakeSource
) -> None:
    loader.load([Range(2, 1), Range(6, 2), Range(4, 4), Range(1, 3)])
    loader.wait()
    order = [i for span in source.fetched for i in range(span.first, span.first + span.count)]
    assert order == [2, 6, 7, 4, 5, 1, 3]
    assert states(arena) == {SegmentState.RESIDENT}
    assert all(holds(arena, source.image, arena.span(i)) for i in range(1, 8))
    assert loader.times().load_bytes == 38 * PAGE_SIZE
    assert loader.times().faults == 0


def test_neighbours_are_read_together_a_huge_page_at_a_time(faults: Userfaultfd) -> None:
    # As sealed models are: the body begins at the next whole MiB, here the third.
    arena = Arena(regions((16 << 10, 150 * (16 << 10)), (1 << 20, 3 << 20), gap=42 * (16 << 10)), faults)
    source = FakeSource(Image(arena.length))
    loader = Loader(arena, source, faults, workers=1)
    loader.load([Range(1, 150), Range(151, 3)])
    loader.wait()
    ends = [(arena.base + s.offset, arena.base + s.offset + s.length - 1) for s in source.fetched]
    pages = [(first // HUGE_PAGE, last // HUGE_PAGE) for first, last in ends]
    assert all(first == last for first, last in pages), "no run crosses into another huge page"
    assert len(set(pages)) == len(pages), "and what lies in one is one run"
    assert [s.count for s in source.fetched][-2:] == [2, 1], "two body segments are exactly a huge page"
    loader.close()
    arena.close()


def test_a_new_plan_replaces_the_old_one(loader: Loader, arena: Arena, source: FakeSource) -> None:
    source.gate.clear()
    loader.load([Range(4, 1), Range(5, 3)])
    eventually(lambda: source.fetched)
    loader.load([Range(1, 1)])
    source.gate.set()
    loader.wait()
    assert arena.segments_in(SegmentState.RESIDENT)[:1] == [1]
    assert [s.first for s in source.fetched][-1] == 1
    assert arena.state(7) == SegmentState.ABSENT


def test_rows_are_waited_for_and_nothing_behind_them(
    loader: Loader, arena: Arena, source: FakeSource
) -> None:
    rows = [Range(1, 1), Range(3, 1)]
    source.gate.clear()
    loader.load([Range(4, 1), Range(1, 3)])
    eventually(lambda: source.fetched)
    loader.extend(rows, Priority.ROWS)
    waiting = threading.Thread(target=loader.wait_for_rows, args=(rows,), daemon=True)
    waiting.start()
    source.gates[2] = threading.Event()  # behind the rows, never opened before they are waited for
    source.gate.set()
    waiting.join(PATIENCE_S)
    assert not waiting.is_alive()
    assert [span.first for span in source.fetched][:3] == [4, 1, 3]
    assert {arena.state(1), arena.state(3)} == {SegmentState.RESIDENT}
    source.gates[2].set()
    loader.wait()
    assert [span.first for span in source.fetched] == [4, 1, 3, 2]


def test_nobody_waits_for_rows_that_nobody_loads(loader: Loader, source: FakeSource) -> None:
    loader.wait_for_rows([Range(1, 2)])  # not planned: compute will ask
    source.gate.clear()
    loader.load([Range(4, 1)])
    eventually(lambda: source.fetched)
    loader.extend([Range(1, 2)], Priority.ROWS)
    waiting = threading.Thread(target=loader.wait_for_rows, args=([Range(1, 2)],), daemon=True)
    waiting.start()
    loader.stop()  # or no longer
    waiting.join(PATIENCE_S)
    assert not waiting.is_alive()
    source.gate.set()


def test_what_is_resident_is_not_loaded_again(loader: Loader, source: FakeSource) -> None:
    loader.load(EVERYTHING)
    loader.wait()
    count = len(source.fetched)
    loader.load(EVERYTHING)
    loader.wait()
    assert len(source.fetched) == count


def test_a_page_that_compute_waits_for_comes_before_the_plan(
    loader: Loader, arena: Arena, source: FakeSource
) -> None:
    source.gate.clear()
    loader.load([Range(1, 1), Range(2, 2), Range(4, 3)])
    eventually(lambda: source.fetched)
    thread = Toucher(address(arena, 7) + 123)
    eventually(lambda: loader.times().faults)
    source.gate.set()
    assert thread.result() == source.image[arena.span(7).offset + 123 :][:1]
    loader.wait()
    assert source.fetched[1].first == 7
    assert loader.times().fault_wait_s > 0


def test_who_reads_on_through_small_segments_gets_more_of_them_with_each_fault(faults: Userfaultfd) -> None:
    made = Arena(regions(embed=(PAGE_SIZE, 200 * PAGE_SIZE)), faults)
    image = Image(made.length)
    loader = Loader(made, FakeSource(image), faults, workers=1)
    try:
        for index in (150, 20, 90):
            touch(address(made, index))
        loader.wait()
        assert made.segments_in(SegmentState.RESIDENT) == [
            20,
            90,
            150,
        ]  # rows of a prompt: no more than these
        touch(made.base, 200 * PAGE_SIZE)
        loader.wait()  # whoever reads goes on a moment before the loader notes that it may
        assert 200 <= len(made.segments_in(SegmentState.RESIDENT)) < 208
        assert loader.times().faults < 40
        assert all(holds(made, image, made.span(i)) for i in range(1, 201))
    finally:
        loader.close()
        close(made, faults)


def test_compute_can_run_far_ahead_of_a_plan(loader: Loader, arena: Arena, source: FakeSource) -> None:
    source.gate.clear()
    loader.load(EVERYTHING)
    threads = [Toucher(address(arena, i), arena.span(i).length) for i in indices(arena.regions)]
    source.gate.set()
    for index, thread in zip(indices(arena.regions), threads, strict=True):
        span = arena.span(index)
        assert thread.result() == source.image[span.offset : span.offset + span.length]


def test_a_single_missing_page_is_refilled(loader: Loader, arena: Arena, source: FakeSource) -> None:
    loader.load(EVERYTHING)
    loader.wait()
    arena.lazy([5])
    advise(address(arena, 5) + 3 * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
    at = arena.span(5).offset
    assert touch(arena.base + at, 8 * PAGE_SIZE) == source.image[at : at + 8 * PAGE_SIZE]
    assert arena.counters.lost_segments == 1
    assert source.fetched[-1].first == 5


# Threads


@pytest.mark.parametrize("seed", range(2))
def test_readers_always_read_the_right_bytes_in_a_storm_of_recalls_and_losses(
    arena: Arena, source: FakeSource, faults: Userfaultfd, seed: int
) -> None:
    loader = Loader(arena, source, faults, workers=3)
    everything = indices(arena.regions)
    wrong: list[int] = []
    reads = [0] * READERS
    calm = threading.Event()

    def read(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        while not calm.is_set():
            span = arena.span(rng.choice(everything))
            if libc.memcmp(arena.base + span.offset, source.image.address + span.offset, span.length):
                wrong.append(span.first)
            reads[number] += 1

    readers = [threading.Thread(target=read, args=(n,), daemon=True) for n in range(READERS)]
    for reader in readers:
        reader.start()
    rng = random.Random(seed)
    storms = 0
    try:
        while storms < STORMS or min(reads) < 20 or arena.counters.recalled_bytes < 100 * PAGE_SIZE:
            storms += 1
            some = rng.sample(everything, 3)
            match rng.randrange(5):
                case 0:
                    loader.load(EVERYTHING)
                case 1:
                    arena.lazy(some)
                    for index in arena.segments_in(SegmentState.LAZY)[:1]:  # as the kernel would
                        advise(address(arena, index), PAGE_SIZE, MADV_DONTNEED)
                case 2:
                    arena.pin(everything)
                case _:
                    arena.recall(some)
    finally:  # they read what is unmapped after the test
        calm.set()
        for reader in readers:
            reader.join(PATIENCE_S)
        loader.close()
    assert not any(reader.is_alive() for reader in readers)
    assert not wrong
    loader.check()


def test_idle_workers_sleep_and_keep_no_plaintext(
    arena: Arena, source: FakeSource, faults: Userfaultfd
) -> None:
    loader = Loader(arena, source, faults, workers=3)
    woken: list[float] = []
    wait = loader._work_to_do.wait

    def counted(timeout: float | None = None) -> bool:
        woken.append(0)
        return wait(timeout)

    loader._work_to_do.wait = counted  # type: ignore[method-assign]
    loader.load(EVERYTHING)
    loader.wait()
    eventually(lambda: len(woken) >= 3)
    count = len(woken)
    threading.Event().wait(0.05)
    assert len(woken) <= count + 3  # woken once each at most; they once woke each other without end
    eventually(lambda: not any(any(s.plain) for s in source.stagings))
    loader.close()


def test_closing_ends_every_thread_even_in_the_middle_of_a_plan(
    arena: Arena, source: FakeSource, faults: Userfaultfd
) -> None:
    before = set(threading.enumerate())
    source.gate.clear()
    loader = Loader(arena, source, faults, workers=2)
    loader.load(EVERYTHING)
    eventually(lambda: len(source.fetched) == 2)
    waiting = threading.Thread(target=loader.wait, daemon=True)
    waiting.start()
    closing = threading.Thread(target=loader.close, daemon=True)
    closing.start()
    eventually(lambda: loader._closing)
    source.gate.set()
    closing.join(PATIENCE_S)
    waiting.join(PATIENCE_S)
    assert set(threading.enumerate()) <= before
    assert len(source.fetched) == 2  # what was begun was ended, no more


def test_closing_twice_leaves_the_descriptors_that_were_opened_in_between(
    arena: Arena, source: FakeSource, faults: Userfaultfd
) -> None:
    loader = Loader(arena, source, faults, workers=1)
    loader.close()
    ours = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    loader.close()
    with pytest.raises(BlockingIOError):
        os.read(ours[0], 1)  # nobody wrote into it
    for number in ours:
        os.close(number)


def test_without_userfaultfd_everything_is_there_when_the_wait_ends() -> None:
    arena = Arena(regions(), None)
    source = FakeSource(Image(arena.length))
    loader = Loader(arena, source, None)
    assert not loader.on_demand
    loader.load(EVERYTHING)
    loader.wait()
    assert states(arena) == {SegmentState.RESIDENT}
    assert all(holds(arena, source.image, arena.span(i)) for i in range(1, 8))
    loader.close()
    arena.close()


# Failures


def test_a_source_that_fails_poisons_and_releases_who_waits(
    loader: Loader, arena: Arena, source: FakeSource
) -> None:
    error = source.errors[6] = RefusedError("segment 6 is bad")
    assert touch(address(arena, 6)) == b"\0"
    with pytest.raises(RefusedError) as caught:
        loader.check()
    assert caught.value is error
    assert touch(address(arena, 7)) == b"\0"  # later ones too, whatever they touch
    loader.load(EVERYTHING)
    loader.wait()
    assert len(source.fetched) == 1


def test_a_failure_in_the_plan_ends_the_wait_with_the_error(
    loader: Loader, arena: Arena, source: FakeSource
) -> None:
    source.errors[2] = RefusedError("segment 2 is bad")
    thread = Toucher(address(arena, 7))
    loader.load(EVERYTHING)
    loader.wait()
    with pytest.raises(RefusedError):
        loader.check()
    thread.result()


@pytest.mark.parametrize("error", [ValueError("surprise"), OSError(5, "Input/output error")])
def test_a_worker_that_dies_poisons_and_says_what_of(
    loader: Loader, arena: Arena, source: FakeSource, error: BaseException
) -> None:
    source.errors[4] = error
    assert touch(address(arena, 4)) == b"\0"
    with pytest.raises(EngineFailure, match=type(error).__name__):
        loader.check()
    loader.wait()


class DyingFaults(Userfaultfd):
    """Dies `lives` times, with the faults it has read in its hands."""

    lives = 1

    def faults(self) -> Iterator[int]:
        found = list(super().faults())
        if found and self.lives:
            self.lives -= 1
            raise RuntimeError("the handler's bug")
        return iter(found)


@pytest.mark.parametrize("lives", [1, 2])
def test_nobody_waits_for_ever_when_the_fault_handler_dies(impatient: None, lives: int) -> None:
    """The first time it serves zeros itself; the second time the watchdog does."""
    faults = DyingFaults()
    faults.lives = lives
    arena = Arena(regions(), faults)
    source = FakeSource(Image(arena.length))
    loader = Loader(arena, source, faults, workers=1)
    threads = [Toucher(address(arena, i)) for i in (1, 5, 7)]
    assert {t.result() for t in threads} == {b"\0"}
    with pytest.raises(EngineFailure, match="fault handler"):
        loader.check()
    assert touch(address(arena, 4)) == b"\0"
    assert loader._handler.is_alive() == (lives == 1)
    loader.close()
    arena.close()
    faults.close()


def test_storage_that_is_silent_ends_the_request(
    impatient: None, loader: Loader, arena: Arena, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "FAULT_TIMEOUT_S", 0.05)
    source.gate.clear()
    assert touch(address(arena, 5)) == b"\0"
    with pytest.raises(EngineFailure, match="segment 5 did not arrive"):
        loader.check()


def test_a_planned_segment_that_never_comes_ends_the_request_too(
    impatient: None, loader: Loader, arena: Arena, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compute waits for it, though no fault had to ask for it."""
    monkeypatch.setattr(loader_module, "FAULT_TIMEOUT_S", 0.05)
    source.gate.clear()
    loader.load([Range(5, 1)])
    eventually(lambda: source.fetched)
    assert touch(address(arena, 5)) == b"\0"
    with pytest.raises(FlexServeError):
        loader.check()


def test_a_process_that_was_frozen_is_not_taken_for_silent_storage(
    impatient: None, loader: Loader, arena: Arena, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.gate.clear()
    thread = Toucher(address(arena, 5))
    eventually(lambda: source.fetched)
    looks: list[float] = []
    clock = time.perf_counter

    def jumping() -> float:
        """The clock went on for an hour each time, and nobody ran."""
        looks.append(clock())
        return looks[-1] + 3600 * len(looks)

    monkeypatch.setattr(time, "perf_counter", jumping)
    eventually(lambda: len(looks) > 20)
    monkeypatch.undo()
    source.gate.set()
    assert thread.result() == source.image[arena.span(5).offset :][:1]
    loader.check()


def test_reading_arena_memory_from_a_thread_never_holds_the_interpreter_lock() -> None:
    """The control of these tests' own tools: ctypes.string_at would hold it."""
    assert not libc.memcpy._flags_ & ctypes._FUNCFLAG_PYTHONAPI  # type: ignore[attr-defined]
