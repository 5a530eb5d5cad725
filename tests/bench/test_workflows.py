"""The workflow benches on tiny models: every policy really runs, and does what its name says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexserve.bench import groups, memory, workflow_run, workflows
from flexserve.bench.groups import GroupsOptions
from flexserve.bench.memory import Condition, FreeMemory, MemoryState
from flexserve.bench.workflow_plot import draw
from flexserve.bench.workflow_run import POLICIES
from flexserve.bench.workflows import WorkflowsOptions
from flexserve.errors import NotFound, Usage

from ..schemas import validate

SHAPES = {"xs": "tiny-qwen3", "s": "tiny-llama-tied", "m": "tiny-qwen3", "l": "tiny-llama"}


class Untouched:
    """Free memory as it is: the real states take all of the machine's."""

    def prepare(self) -> None:
        pass

    def release(self) -> Condition:
        return Condition(first_touch_s_per_gb=0.5, prepare_s=0.0)

    def close(self) -> None:
        pass


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    def untouched(state: MemoryState, need_bytes: int) -> FreeMemory:
        assert state == MemoryState.BACKED
        assert need_bytes > 1 << 30
        return Untouched()

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(memory, "free_memory", untouched)
    monkeypatch.setattr(workflow_run, "PAUSE_S", 0.0)
    return tmp_path / "bench"


def test_every_policy_runs_a_workflow(directory: Path) -> None:
    said: list[str] = []
    options = WorkflowsOptions(
        ("Voice-Routing",),
        rounds=1,
        warm=1,
        wrong=1,
        seed=5,
        directory=directory,
        threads=1,
        shapes=SHAPES,
    )
    result = workflows.run(options, said.append)
    validate("bench-workflows", result)
    assert set(result["workflows"]) == {"Voice-Routing"}
    assert set(result["skipped"]) == {"keep_all_as_is", "keep_all_fair"}
    assert set(result["models"]) == {"xs", "s", "l"}  # m is part of the budget, and not of these workflows
    for row in result["workflows"].values():
        assert {*row, *result["skipped"]} == set(POLICIES)
        for policy, one in row.items():
            (run,) = one["runs"]
            steps = run["steps"]
            before = sum(step["ttft_s"] + step["decode_s"] for step in steps[:-1])
            assert run["latency_s"] >= before + steps[-1]["ttft_s"]
            if policy.endswith("as_is"):
                assert {step["load_bytes"] for step in steps} == {None}
                assert not any(step["cached_prompt_tokens"] for step in steps)
            else:  # the constant part's KV is there
                cached = [step["cached_prompt_tokens"] for step in steps]
                assert min(cached) >= 64, (policy, cached, steps)
            if policy == "load_per_request_fair":
                assert all(step["load_bytes"] for step in steps)
            if policy != "flexserve":
                assert not any(step["prefetched_bytes"] for step in steps)
    assert {name for name, ratio in result["ratios"].items() if ratio is None} == set(result["skipped"])
    assert set(result["prefetch"]["load_s"]) == {"xs", "s", "l"}
    (guess,) = result["wrong_prefetch"]["guesses"]
    assert guess["guessed_model"] != guess["asked_model"]
    assert not list(directory.glob("workflows-*"))  # saved conversations are gone
    assert any("seed 5" in line for line in said)


def test_groups_ask_several_models_in_turns(directory: Path) -> None:
    options = GroupsOptions(
        ("s+l",),
        ("keep_all_fair", "load_per_request_fair", "lru_fair", "flexserve"),
        rounds=1,
        requests=6,
        prompt_tokens=24,
        output_tokens=3,
        budget_bytes=64 << 20,
        seed=1,
        directory=directory,
        threads=1,
        shapes=SHAPES,
    )
    result = groups.run(options, lambda _text: None)
    validate("bench-groups", result)
    group = result["groups"]["s+l"]
    assert group["skipped"] == {}
    loaded = {
        policy: sum(one["load_bytes"] > 1 << 20 for one in row["requests"])
        for policy, row in group["results"].items()
    }
    assert {len(row["requests"]) for row in group["results"].values()} == {6}
    assert loaded["load_per_request_fair"] == 6
    assert loaded["keep_all_fair"] == loaded["lru_fair"] <= 1  # each model once, of which one by the lead-in
    assert {name for name, ratio in result["ratios"].items() if ratio is not None} == {
        "keep_all_fair",
        "load_per_request_fair",
        "lru_fair",
    }


def test_bars_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw({"A": {"lru_fair": 2.0, "flexserve": 1.0}, "B": {"flexserve": 1.0}}, "s", tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000
    with pytest.raises(Usage, match="cannot draw"):
        draw({"A": {"flexserve": 1.0}}, "s", tmp_path / "bars.txt")


@pytest.mark.parametrize(
    ("error", "wrong"),
    [
        (NotFound, {"workflows": ("Fact-Chequing",)}),
        (Usage, {"workflows": ("Smart-Alarm", "Smart-Alarm")}),
        (Usage, {"policies": ("sometimes",)}),
        (Usage, {"policies": ()}),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_measured(
    directory: Path, error: type[Exception], wrong: dict[str, Any]
) -> None:
    with pytest.raises(error):
        workflows.run(WorkflowsOptions(directory=directory, shapes=SHAPES, **wrong), lambda _text: None)
    assert not list(directory.glob("*.gguf"))


@pytest.mark.parametrize("group", ["s", "s+s", "s+huge", ""])
def test_a_group_has_several_models_that_there_are(directory: Path, group: str) -> None:
    with pytest.raises(Usage):
        groups.run(GroupsOptions((group,), directory=directory, shapes=SHAPES), lambda _text: None)
