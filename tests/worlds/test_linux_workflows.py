"""Workflows in the linux world: the next model is fetched while the one before decodes, answers stay the same."""

from __future__ import annotations

import dataclasses
import itertools
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexserve.core import Finished, Request, Sampling, WorkflowReport
from flexserve.errors import InvalidRequest, NotFound
from flexserve.worlds.base import ModelSource
from flexserve.worlds.linux import LinuxWorld
from flexserve.worlds.linux.workflows import FILE

from ..world_fixtures import DEMO, SMALL_LIMITS, Device, linux_world, make_device
from .linux_inside import world_inside

MIB = 1 << 20
# Three models of four megabytes, and room for two of them with their KV.
TIGHT = dataclasses.replace(SMALL_LIMITS, budget_bytes=11 * MIB, lazy=False, prefetch_ahead_bytes=MIB)
NAMES = ("first", "second", "third")
SYSTEM = "You are the one who sets alarms and lamps in a small house by the sea, and nothing else. "
_ids = itertools.count()


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Device, list[ModelSource]]:
    device = make_device(tmp_path_factory.mktemp("device"))
    return device, [device.add(name, DEMO) for name in NAMES]


@pytest.fixture
def world(kit: tuple[Device, list[ModelSource]]) -> Iterator[LinuxWorld]:
    with world_inside(kit[0], settings=TIGHT) as (made, _):
        for source in kit[1]:
            made.register(source)
        yield made


def ask(world: LinuxWorld, model: str, text: str = "Wake me at seven.", **more: Any) -> Finished:
    request = Request(
        id=f"workflow-{next(_ids)}",
        model=model,
        prompt=SYSTEM + text,
        max_tokens=48,
        ignore_eos=True,
        sampling=Sampling(temperature=0),
        **{"client": "house", **more},
    )
    *_, last = world.generate(request)
    assert isinstance(last, Finished)
    return last


def prefetches(world: LinuxWorld) -> dict[str, set[str]]:
    """Of each model that was prefetched, the reasons."""
    found: dict[str, set[str]] = {}
    for line in map(json.loads, world.trace()):
        do = line.get("do", {})
        if do.get("type") == "LoadRange" and do["priority"] == 2:
            found.setdefault(do["model"], set()).add(line["why"])
    return found


def test_a_repeated_sequence_is_learned_and_its_next_model_fetched_during_the_decode(
    world: LinuxWorld,
) -> None:
    before = [ask(world, name) for name in NAMES]
    for number in range(3):
        for name in NAMES:
            ask(world, name, f"Turn on lamp number {number}.")
    again = [ask(world, name) for name in NAMES]
    assert [a.token_ids for a in again] == [b.token_ids for b in before]
    assert "predicted" in set().union(*prefetches(world).values())
    assert max(a.timings.prefetched_bytes for a in again) >= MIB
    events = [
        line["event"]["type"] if "event" in line else line["do"]["type"] + str(line["do"].get("priority", ""))
        for line in map(json.loads, world.trace())
        if "event" in line or "do" in line
    ]
    started = [i for i, name in enumerate(events) if name == "DecodeStarted"]
    finished = [i for i, name in enumerate(events) if name == "RequestFinished"]
    during = [
        i
        for i, name in enumerate(events)
        if name == "LoadRange2" and any(a < i < b for a, b in zip(started, finished, strict=True))
    ]
    assert during, "it was fetched while the model before it decoded"
    report = world.workflows()
    assert report.prefetch
    assert report.hits > 0
    assert report.prefetched_bytes >= sum(a.timings.prefetched_bytes for a in again)
    assert report.saved_s >= 0
    after = {w.next_model: w for w in report.workflows if w.steps == ("first",)}
    assert after["second"].confidence > 0.6
    assert after["second"].client not in ("", "house")


def test_a_wrong_hint_changes_no_answer(world: LinuxWorld) -> None:
    expected = ask(world, "first", client=None).token_ids
    other = ask(world, "second", client=None).token_ids
    for _ in range(3):
        assert ask(world, "first", next_model="third", client="liar").token_ids == expected
    assert ask(world, "second", next_model="third", client="liar").token_ids == other
    assert ask(world, "first", next_model="first", client="liar").token_ids == expected
    report = world.workflows()
    assert report.predictions > report.hits
    assert "hinted" in prefetches(world)["third"]


def test_switched_off_nothing_is_fetched_and_answers_are_the_same(
    kit: tuple[Device, list[ModelSource]], world: LinuxWorld
) -> None:
    with world_inside(kit[0], settings=dataclasses.replace(TIGHT, prefetch=False)) as (off, _):
        for source in kit[1]:
            off.register(source)
        answers = [ask(off, model, next_model="second") for model in ("first", "second") * 3]
        assert prefetches(off) == {}
        assert {a.timings.prefetched_bytes for a in answers} == {0}
        assert not off.workflows().prefetch
    assert ask(world, "first").token_ids == answers[0].token_ids


def test_a_pinned_model_stays_where_the_least_invoked_would_go(
    kit: tuple[Device, list[ModelSource]],
) -> None:
    with world_inside(kit[0], settings=TIGHT, prefetch=False, pinned=("second",)) as (made, _):
        for source in kit[1]:
            made.register(source)
        for model in ("second", "first", "third", "first", "third"):
            ask(made, model)
        status = made.status()
        models = {m.info.name: m for m in status.models}
        assert {name for name, m in models.items() if m.pinned} == {"second"}
        assert models["second"].prefix_bytes == models["second"].info.weight_bytes
        assert (
            min(models[name].prefix_bytes for name in ("first", "third")) < models["first"].info.weight_bytes
        )
        assert not status.prefetch
        assert not made.workflows().prefetch
        assert prefetches(made) == {}


def test_a_declared_workflow_is_followed_at_the_first_time(world: LinuxWorld) -> None:
    world.declare_workflow("house", "evening", ["first", "second"])
    ask(world, "first")
    assert prefetches(world) == {"second": {"predicted"}}
    assert ask(world, "second").timings.prefetched_bytes > 0
    assert {w.declared for w in world.workflows().workflows} >= {"evening"}
    for models in (["first"], ["first"] * 17, ["first", ""]):
        with pytest.raises(InvalidRequest, match="steps"):
            world.declare_workflow("house", "evening", models)


def learned(report: WorkflowReport) -> set[tuple[str, str]]:
    return {(w.steps[0], w.next_model) for w in report.workflows}


def test_the_log_outlives_the_process_without_a_word_of_a_prompt_or_a_name(
    kit: tuple[Device, list[ModelSource]], tmp_path: Path
) -> None:
    device, sources = kit
    options: dict[str, Any] = {"hardened": False, "session_dir": tmp_path, "session_bytes": 0}
    with linux_world(device, **options) as world:
        for source in sources[:2]:
            world.register(source)
        for model in ("first", "second") * 3:
            ask(world, model)
        before = world.workflows()
        assert before.note == ""
    file = tmp_path / FILE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for word in (b"house", b"first", b"second", SYSTEM[:8].encode()):
        assert word not in file.read_bytes()
    with linux_world(device, **options) as world:
        after = world.workflows()
        assert learned(after) == learned(before) == {("first", "second"), ("second", "first")}
        assert {w.seen for w in after.workflows} == {w.seen for w in before.workflows}
        assert after.predictions == before.predictions
        with pytest.raises(NotFound, match="0badc0de"):
            world.forget_workflows(workflow="0badc0de")
        assert world.forget_workflows("somebody else") == 0
        assert world.forget_workflows("house") == 2
        assert learned(world.workflows()) == set()


def test_a_log_that_is_damaged_or_another_devices_is_begun_anew_and_said(
    kit: tuple[Device, list[ModelSource]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device, sources = kit
    options: dict[str, Any] = {"session_dir": tmp_path, "session_bytes": 0}
    with world_inside(device, **options) as (world, _):
        for source in sources[:2]:
            world.register(source)
        for model in ("first", "second") * 2:
            ask(world, model)
    whole = (tmp_path / FILE).read_bytes()
    other = make_device(tmp_path / "other")
    damaged = bytes([*whole[:-1], whole[-1] ^ 1])
    for data, of, why in (
        (damaged, device, "is not what this device wrote"),
        (whole, other, "was saved by another device"),
        (b"", device, "has an impossible size"),
        (bytes(200), device, "has another format"),
    ):
        (tmp_path / FILE).write_bytes(data)
        caplog.clear()
        with world_inside(of, **options) as (world, _):
            report = world.workflows()
        assert why in report.note
        assert report.workflows == ()
        assert [why in record.message for record in caplog.records] == [True]
