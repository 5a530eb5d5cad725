"""The benches' verbs: what they hand to a bench, and how its result looks. What they measure is in tests/bench."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flexserve.cli.bench import command

MODULES = {
    "cold-start": "cold_start",
    "memory": "memory_bench",
    "soak": "soak",
    "equality": "equality",
    "neighbours": "neighbours",
    "ablation": "ablation",
    "workflows": "workflows",
    "groups": "groups",
}
SPREAD = {"median": 1.5, "min": 1.0, "max": 2.0, "count": 3}


class Bench:
    """Stands for a bench's `run`: the options it got, and a result to give."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, verb: str, result: dict[str, Any]) -> None:
        self.options: Any = None
        self._verb, self._result = verb, result
        monkeypatch.setattr(importlib.import_module(f"flexserve.bench.{MODULES[verb]}"), "run", self._run)

    def _run(self, options: Any, say: Any, progress: Any = None) -> dict[str, Any]:
        self.options = options
        return self._result

    def call(self, *arguments: str) -> Result:
        result = CliRunner().invoke(command, [self._verb, *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result


@pytest.mark.parametrize("verb", MODULES)
def test_every_verb_hands_its_options_over_and_prints_json(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = {"bench": verb, "violations": 0, "equal": True}
    bench = Bench(monkeypatch, verb, made)
    assert json.loads(bench.call("--json").stdout) == made
    assert bench.options.directory == tmp_path / "flexserve" / "bench"
    usual = type(bench.options)()
    for name in vars(usual):
        if name != "directory":
            assert getattr(bench.options, name) == getattr(usual, name), name
    bench.call("--json", "--directory", str(tmp_path), "--threads", "3", "--quant", "Q4_0")
    assert (bench.options.directory, bench.options.threads, bench.options.quant) == (tmp_path, 3, "Q4_0")


def test_calibrate_gets_a_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from flexserve.bench import calibrate

    seen: list[Path] = []

    def run(directory: Path, say: Any, progress: Any = None) -> dict[str, Any]:
        seen.append(directory)
        return {"bench": "calibrate"}

    monkeypatch.setattr(calibrate, "calibrate", run)
    result = CliRunner().invoke(command, ["calibrate", "--directory", str(tmp_path), "--json"])
    assert json.loads(result.stdout) == {"bench": "calibrate"}
    assert seen == [tmp_path]


def test_workflows_are_a_table_of_policies_and_one_of_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(
        monkeypatch,
        "workflows",
        {
            "workflows": {
                "Fact-Checking": {
                    "lru_fair": {"latency_s": SPREAD | {"median": 4.0}},
                    "flexserve": {"latency_s": SPREAD},
                },
                "Smart-Alarm": {"flexserve": {"latency_s": SPREAD}},
            },
            "ratios": {"lru_fair": 0.375, "timer_fair": None},
            "ratios_by_workflow": {"lru_fair": {"Fact-Checking": 0.375}, "timer_fair": {}},
            "prefetch": {"saving": 0.3, "steps": [{}]},
            "wrong_prefetch": {"cost": 0.012},
            "skipped": {"keep_all_fair": "too large"},
        },
    )
    result = bench.call("--policies", "lru_fair, flexserve", "--workflows", "Fact-Checking,Smart-Alarm")
    assert bench.options.policies == ("lru_fair", "flexserve")
    assert bench.options.workflows == ("Fact-Checking", "Smart-Alarm")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["lru_fair", "4.00", "-"] in lines
    assert ["flexserve", "1.50", "1.50"] in lines
    assert ["flexserve", "/", "lru_fair", "0.38", "0.38", "to", "0.38", "<=", "0.85"] in lines
    assert "prefetch saves 30 %" in result.stdout
    assert "1.2 %" in result.stdout
    assert "keep_all_fair was not measured: too large" in result.stderr


def test_groups_are_a_table_too_and_bars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bench = Bench(
        monkeypatch,
        "groups",
        {
            "groups": {
                "s+l": {"results": {"lru_as_is": {"mean_ttft_s": 2.0}, "flexserve": {"mean_ttft_s": 1.0}}}
            },
            "ratios": {"lru_as_is": 0.5},
            "ratios_by_group": {"lru_as_is": {"s+l": 0.5}},
        },
    )
    result = bench.call("--groups", "s+l", "--budget", "1G", "--plot", str(tmp_path / "bars.svg"))
    assert (bench.options.groups, bench.options.budget_bytes) == (("s+l",), 1 << 30)
    assert "lru_as_is" in result.stdout
    assert (tmp_path / "bars.svg").read_text().startswith("<?xml")


def test_a_soak_that_found_something_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, "soak", {"violations": 2})
    with pytest.raises(AssertionError):
        bench.call("--json")


def test_answers_that_differ_end_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = dict.fromkeys(("tokens", "seed", "recalls", "lost_segments"), 1000)
    times = dict.fromkeys(("undisturbed_s", "disturbed_s"), 1.5)
    Bench(monkeypatch, "equality", {"equal": False, "equal_tokens": 7, **numbers, **times})
    result = CliRunner().invoke(command, ["equality"])
    assert result.exit_code == 1
    assert "DIFFERENT: 7 of 1000 tokens" in result.stdout
