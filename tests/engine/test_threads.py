"""Where compute threads run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from flexserve.bench.shapes import shape_named
from flexserve.engine import threads
from flexserve.engine.llama import Context, ContextOptions, Model
from flexserve.flexmem.processors import PROCESSORS

from .secure_models import Opener, answer, request

Affinity = frozenset[int]
PROMPT = request(token_ids=(1, 2, 3), max_tokens=2)


def tasks() -> set[str]:
    return {path.name for path in Path("/proc/self/task").iterdir()}


def affinities_of_new_threads(work: Callable[[], object]) -> list[Affinity]:
    """Of the thread that did `work`, while it still lives, and of those it left behind."""
    before = tasks()
    found: list[Affinity] = []

    def run() -> None:
        os.sched_setaffinity(
            0, PROCESSORS
        )  # an earlier test may have computed on the thread that starts this one
        work()
        found.extend(frozenset(os.sched_getaffinity(int(task))) for task in tasks() - before)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found


needs_two = pytest.mark.skipif(len(PROCESSORS) < 2, reason="one processor: there is nothing to bind")


@needs_two
def test_a_thread_per_processor_stays_on_its_own(opener: Opener) -> None:
    gguf = opener.generate(shape_named("tiny-llama"), "Q8_0")
    opened = opener.open(gguf, threads=len(PROCESSORS))
    found = affinities_of_new_threads(lambda: answer(opened.model, PROMPT))
    assert sorted(found, key=min) == [frozenset({cpu}) for cpu in sorted(PROCESSORS)]
    opener.discard(opened)


@needs_two
def test_threads_that_are_not_bound_go_anywhere(opener: Opener) -> None:
    model = Model.from_file(opener.generate(shape_named("tiny-llama"), "Q8_0"), load_mode=0)
    context = Context(model, ContextOptions(64, len(PROCESSORS), bind_threads=False))
    assert set(affinities_of_new_threads(lambda: context.decode([1, 2, 3]))) == {PROCESSORS}
    context.close()
    model.close()


@needs_two
def test_a_loader_made_by_a_bound_thread_goes_anywhere(opener: Opener) -> None:
    gguf = opener.generate(shape_named("tiny-llama"), "Q8_0")

    def bound() -> None:
        os.sched_setaffinity(0, {min(PROCESSORS)})
        opened = opener.open(gguf)
        answer(opened.model, PROMPT)
        assert any(thread.name.startswith("load-") for thread in threading.enumerate())

    found = affinities_of_new_threads(bound)
    assert found.count(PROCESSORS) == len(found) - 1  # all but the one that was bound


@needs_two
def test_fewer_threads_than_processors_are_left_to_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "PROCESSORS", PROCESSORS | {max(PROCESSORS) + 1})
    assert threads.bind(None, len(PROCESSORS)) is None
