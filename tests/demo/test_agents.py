"""The demo agents: every step of the file of workflows has something real to say, and the whole demo runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from flexserve.bench import workflow_file
from flexserve.cli.demo import command
from flexserve.cli.main import cli
from flexserve.demo.agents import Options, default_models, model_files, run
from flexserve.demo.prompts import AGENTS, SCRIPTS, SYSTEM
from flexserve.errors import NotFound

from ..schemas import validate

WORKFLOWS = workflow_file.load()


def test_every_model_class_of_the_file_has_an_agent_and_every_agent_a_system_message() -> None:
    assert set(AGENTS) == set(WORKFLOWS.classes)
    assert set(AGENTS.values()) == set(SYSTEM)


def test_the_scripts_say_something_in_every_step_of_every_workflow_and_something_else_next_time() -> None:
    assert set(SCRIPTS) == {workflow.name for workflow in WORKFLOWS.workflows}
    for workflow in WORKFLOWS.workflows:
        script = SCRIPTS[workflow.name]
        assert len(script.says) == len(workflow.steps)
        for step in range(len(workflow.steps)):
            assert script.say(step, 0) != script.say(step, 1)
            assert script.say(step, 0) == script.say(step, len(script.says[step]))


def test_a_directory_without_the_models_is_refused_by_the_name_of_the_first(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="router"):
        model_files(tmp_path)


def test_the_demo_runs_all_workflows_under_a_budget_that_does_not_hold_the_models(tmp_path: Path) -> None:
    result = run(Options(default_models(), rounds=3, threads=1), tmp_path, lambda text: None)
    validate("demo-agents", result)
    assert result["budget_bytes"] < result["weight_bytes"]
    routed = {
        step["answer"] for one in result["workflows"] for step in one["steps"] if step["agent"] == "router"
    }
    assert routed <= {"assistant", "rewriter", "guard", "none"}
    assert any(one["prefetched_bytes"] > 0 for one in result["workflows"])


def test_with_less_than_the_largest_model_and_its_keys_and_values_it_is_streamed(tmp_path: Path) -> None:
    result = run(
        Options(default_models(), rounds=1, threads=1, budget_bytes=4 << 20), tmp_path, lambda text: None
    )
    assert result["budget_bytes"] == 4 << 20 < 0.45 * result["weight_bytes"]
    assert all(step["answer"] for one in result["workflows"] for step in one["steps"])


def test_a_budget_with_which_an_agent_could_not_answer_is_refused_at_once() -> None:
    outcome = CliRunner().invoke(cli, ["demo", "agents", "--budget", "1M"])
    assert outcome.exit_code == 2, outcome.output
    assert f"with a budget of {1 << 20} bytes the assistant does not answer" in outcome.stderr
    assert "hint: give at least --budget " in outcome.stderr


def test_the_table_names_every_workflow(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {
        "agent": "guard",
        "say": "a",
        "answer": "b\x1b",
        "ttft_s": 0.1,
        "load_bytes": 1,
        "prefetched_bytes": 2,
    }
    one = {
        "workflow": "Smart-Alarm",
        "steps": [step],
        "first_latency_s": 0.2,
        "later_latency_s": 0.1,
        "later_latency_without_prefetch_s": 0.15,
        "prefetched_bytes": 2_000_000,
        "saved_s": 0.05,
    }
    learned = {"predictions": 3, "hits": 2, "prefetched_bytes": 4_000_000, "wasted_bytes": 0}
    found = {"workflows": [one], "prefetch": learned, "weight_bytes": 9_000_000, "budget_bytes": 5_000_000}
    monkeypatch.setattr("flexserve.demo.agents.run", lambda *arguments: found)
    outcome = CliRunner().invoke(command, ["agents"])
    assert outcome.exit_code == 0, outcome.output
    for text in (
        "Smart-Alarm",
        "200 ms",
        "100 ms",
        "50.0 ms",
        "2.0 MB",
        "of 3 predictions 2 came true",
        "\ufffd",
    ):
        assert text in outcome.output
    assert "\x1b" not in outcome.output


def test_demo_is_a_verb() -> None:
    outcome = CliRunner().invoke(cli, ["demo", "--help"])
    assert "agents" in outcome.output
