"""Memory of the linux world taken in every way, at any time: the answers stay the same, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flexserve.core import Finished, Request, Sampling
from flexserve.errors import OutOfBudget
from flexserve.flexmem.arena import SegmentState
from flexserve.worlds.base import ModelSource
from flexserve.worlds.linux import LinuxWorld
from flexserve.worlds.linux.secure import SecureWorld

from ..world_fixtures import DEMO, SMALL_LIMITS, Device, make_device
from .linux_inside import arena_of, kernel_takes, world_inside

MIB = 1 << 20
EVERYTHING = 1 << 40
PATIENCE_S = 60.0
PROMPTS = (
    "Wake me at seven.",
    "Turn on the lamp in the kitchen.",
    "What is the weather like tomorrow?",
    "Play some music that is not too loud, please.",
)
QUICK = dataclasses.replace(
    SMALL_LIMITS, lazy_after_s=0.0, save_after_s=0.02, calm_s=0.02, suspend_limit_s=60.0
)
_ids = itertools.count()


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Device, ModelSource]:
    device = make_device(tmp_path_factory.mktemp("device"))
    return device, device.add("demo", DEMO)


World = tuple[LinuxWorld, SecureWorld]


@pytest.fixture
def quick(kit: tuple[Device, ModelSource], tmp_path: Path) -> Iterator[World]:
    """Everything that waits for calm happens at once, and sessions are saved."""
    with world_inside(kit[0], settings=QUICK, session_dir=tmp_path / "sessions") as made:
        made[0].register(kit[1])
        yield made


def ask(world: LinuxWorld, prompt: str, max_tokens: int, session: str | None = None) -> Finished:
    *_, last = world.generate(request(prompt, max_tokens, session))
    assert isinstance(last, Finished)
    return last


def request(prompt: str, max_tokens: int, session: str | None = None) -> Request:
    return Request(
        id=f"memory-{next(_ids)}",
        model="demo",
        prompt=prompt,
        max_tokens=max_tokens,
        ignore_eos=True,
        sampling=Sampling(temperature=0),
        session=session,
    )


def eventually(condition: Callable[[], object]) -> None:
    pause = threading.Event()
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never happened"
        pause.wait(0.002)


def whys(world: LinuxWorld) -> set[str]:
    """The reasons of all decisions so far."""
    return {line["why"] for line in map(json.loads, world.trace()) if "why" in line}


def effects(world: LinuxWorld) -> set[str]:
    """The kinds of all effects so far: why a request was stopped depends on who was first to want its memory."""
    return {line["do"]["type"] for line in map(json.loads, world.trace()) if "do" in line}


def storm(made: World, tokens_wanted: int, seed: int) -> None:
    world, inside = made
    rng = random.Random(seed)
    expected = {(p, n): ask(world, p, n).token_ids for p in PROMPTS for n in (24, 60)}
    arena = arena_of(inside)
    over = threading.Event()
    errors: list[BaseException] = []
    lost = 0

    def disturb() -> None:
        nonlocal lost
        try:
            while not over.wait(rng.random() * 0.02):
                match rng.randrange(4):
                    case 0:
                        world.recall(rng.choice((MIB, 2 * MIB, EVERYTHING)))
                    case 1:
                        world.offer(rng.randrange(4 * MIB))
                    case 2:
                        world.budget(soft_bytes=rng.randrange(2 * MIB, 8 * MIB))
                    case _:
                        lost += kernel_takes(arena, rng)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=disturb)
    thread.start()
    made_tokens = answers = 0
    try:
        while made_tokens < tokens_wanted:
            prompt, count = rng.choice(list(expected))
            assert ask(world, prompt, count).token_ids == expected[prompt, count], (prompt, count, answers)
            made_tokens += count
            answers += 1
            if rng.random() < 0.2:
                over.wait(0.02)  # some idle time, in which weights become lazy
    finally:
        over.set()
        thread.join(PATIENCE_S)
    assert not errors, errors
    assert arena.counters.recalled_bytes > 4 * MIB
    assert world.status().restarts == 0
    inside._runner._framework.check()
    world.budget(soft_bytes=64 * MIB)
    assert ask(world, PROMPTS[0], 24).token_ids == expected[PROMPTS[0], 24]


def test_a_storm_of_recalls_losses_and_budgets_changes_no_answer(quick: World) -> None:
    storm(quick, 600, seed=1)


@pytest.mark.slow
def test_a_long_storm_of_recalls_losses_and_budgets_changes_no_answer(quick: World) -> None:
    storm(quick, 10_000, seed=2)


def test_idle_weights_are_lazy_and_those_the_kernel_took_come_back(quick: World) -> None:
    world, inside = quick
    arena = arena_of(inside)
    undisturbed = ask(world, PROMPTS[0], 24).token_ids
    size = world.status().models[0].resident_bytes
    assert size > 0
    eventually(lambda: world.status().models[0].lazy_bytes == size)
    lost = 0
    while not lost:
        lost = kernel_takes(arena, random.Random(3))
    assert ask(world, PROMPTS[0], 24).token_ids == undisturbed
    assert arena.counters.lost_segments == lost
    assert "nobody_uses_it" in whys(world)


def test_without_lazy_no_page_is_the_kernels_to_take(
    kit: tuple[Device, ModelSource],
) -> None:
    settings = dataclasses.replace(QUICK, lazy=False)
    with world_inside(kit[0], settings=settings) as (world, inside):
        world.register(kit[1])
        ask(world, PROMPTS[0], 24)
        world.recall(0).wait(PATIENCE_S)
        assert arena_of(inside).segments_in(SegmentState.LAZY) == []
        assert "nobody_uses_it" not in whys(world)


def test_below_the_size_of_the_model_it_answers_streaming_the_tail_and_says_so(quick: World) -> None:
    world, _ = quick
    whole = ask(world, PROMPTS[1], 40)
    assert whole.timings.streamed_bytes == 0
    world.budget(soft_bytes=3 * MIB)
    streamed = ask(world, PROMPTS[1], 40)
    assert streamed.token_ids == whole.token_ids
    assert 0 < streamed.timings.streamed_bytes < world.status().models[0].info.weight_bytes
    budget = world.status().budget
    assert budget is not None
    assert budget.held_bytes <= budget.soft_bytes + 3 * MIB  # a segment for each loader


def test_kv_of_an_open_answer_is_saved_and_the_answer_goes_on_when_memory_comes_back(
    kit: tuple[Device, ModelSource], tmp_path: Path
) -> None:
    settings = dataclasses.replace(QUICK, floor_bytes=0)
    with world_inside(kit[0], settings=settings, session_dir=tmp_path / "sessions") as (world, inside):
        world.register(kit[1])
        undisturbed = ask(world, PROMPTS[2], 400, "other").token_ids
        answer = world.generate(request(PROMPTS[2], 400, "one"))
        tokens = [next(answer) for _ in range(5)]
        recalled = world.recall(EVERYTHING).wait(PATIENCE_S)
        assert recalled.freed_bytes > 0
        eventually(lambda: world.budget().held_bytes == 0)
        eventually(lambda: arena_of(inside).resident_pages() == 0)
        assert list((tmp_path / "sessions").glob("*")), "its KV is in a file"
        world.offer(64 * MIB)
        *_, last = answer
        assert isinstance(last, Finished)
        assert last.token_ids == undisturbed
        assert last.timings.suspended_s > 0
        assert tokens
        assert {"SuspendRequest", "SaveSession", "RestoreSession", "ResumeRequest"} <= effects(world)


def test_an_answer_that_waits_too_long_for_memory_ends_with_one_error(
    kit: tuple[Device, ModelSource], tmp_path: Path
) -> None:
    settings = dataclasses.replace(QUICK, floor_bytes=0, suspend_limit_s=0.1)
    with world_inside(kit[0], settings=settings, session_dir=tmp_path / "sessions") as (world, _):
        world.register(kit[1])
        answer = world.generate(request(PROMPTS[2], 900))
        next(answer)
        world.recall(EVERYTHING)
        with pytest.raises(OutOfBudget, match="memory budget"):
            list(answer)
        world.offer(64 * MIB)
        assert ask(world, PROMPTS[2], 24).finish_reason == "length"


def test_without_a_storage_the_kv_of_an_open_answer_stays(kit: tuple[Device, ModelSource]) -> None:
    settings = dataclasses.replace(QUICK, floor_bytes=MIB)
    with world_inside(kit[0], settings=settings) as (world, _):
        world.register(kit[1])
        undisturbed = ask(world, PROMPTS[2], 100).token_ids
        answer = world.generate(request(PROMPTS[2], 100))
        next(answer)
        world.recall(EVERYTHING).wait(PATIENCE_S)
        world.offer(64 * MIB)
        *_, last = answer
        assert isinstance(last, Finished)
        assert last.token_ids == undisturbed
        # It may have stopped for want of a stream's window, with its KV in memory. The idle one may be given up.
        done = [line["do"] for line in map(json.loads, world.trace()) if "do" in line]
        *_, computed = [one["session"] for one in done if one["type"] == "ComputePrompt"]
        kinds = {"SaveSession", "DropSession", "RestoreSession"}
        assert not [one for one in done if one["type"] in kinds and one["session"] == computed]


def test_the_least_budget_of_a_model_is_enough_to_stream_it_and_less_is_refused(
    kit: tuple[Device, ModelSource],
) -> None:
    with world_inside(kit[0], settings=dataclasses.replace(QUICK, floor_bytes=0)) as (world, _):
        world.register(kit[1])
        undisturbed = ask(world, PROMPTS[0], 24).token_ids
        least = world.status().models[0].least_bytes
        world.recall(EVERYTHING).wait(PATIENCE_S)
        world.budget(least, least)
        streamed = ask(world, PROMPTS[0], 24)
        assert streamed.token_ids == undisturbed
        assert streamed.timings.streamed_bytes > 0
        world.budget(hard_bytes=least - 1)
        with pytest.raises(OutOfBudget, match="no offer lifts"):
            ask(world, PROMPTS[0], 24)
        world.budget(1 << 30, 1 << 30)
        assert ask(world, PROMPTS[0], 24).token_ids == undisturbed
