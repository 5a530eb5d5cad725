"""`flexserve budget`, and what `ps` says about memory, over the fake world."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flexserve.worlds.fake import write_fake_model

from ..schemas import validate
from .conftest import Shell
from .memory_server import Server, serving_shell


@pytest.fixture
def server(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving_shell(shell, tmp_path, monkeypatch) as found:
        yield found


def test_without_a_size_it_only_says_what_holds(server: Server) -> None:
    before = server.shell.json("budget --json")
    validate("budget", before)
    assert before == {
        "soft_bytes": 1 << 30,
        "hard_bytes": 2 << 30,
        "floor_bytes": 0,
        "held_bytes": 0,
        "wanted_bytes": 0,
    }
    out = server.shell.ok("budget")
    assert "held         0 B  weights in memory" in out
    assert "hard cap  2.1 GB  no offer lifts the budget above" in out
    assert server.shell.json("budget --json") == before


def test_a_smaller_budget_takes_memory_at_once_and_answers_stay_the_same(server: Server) -> None:
    before = server.complete("hello")
    assert server.shell.json("budget 2M --json")["held_bytes"] == 2 << 20
    assert server.complete("hello") == before
    assert server.shell.json("budget --json")["held_bytes"] == 2 << 20


def test_limits_are_set_together(server: Server) -> None:
    out = server.shell.json("budget 1.5G --hard 1G --floor 64M --json")
    assert (out["soft_bytes"], out["hard_bytes"], out["floor_bytes"]) == (1 << 30, 1 << 30, 64 << 20)


def test_limits_that_contradict_each_other_are_refused_and_nothing_changes(server: Server) -> None:
    before = server.shell.json("budget --json")
    error = server.shell.fails(2, "budget --floor 2G --hard 1G")
    assert "above the hard cap" in error
    assert server.shell.json("budget --json") == before


@pytest.fixture
def narrow(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The model `demo` answers with a budget of 6 MiB, and `large` with 20."""
    least = {"demo": 6 << 20, "large": 20 << 20}
    with serving_shell(shell, tmp_path, monkeypatch, least_bytes=least) as found:
        found.running.gateway.register(write_fake_model(tmp_path, "large"))
        yield found


@pytest.mark.parametrize("limits", ["2M", "--hard 2M", "2M --hard 1G", "1G --hard 2M", "2M --floor 1M"])
def test_a_budget_with_which_no_model_could_answer_is_refused_and_nothing_changes(
    narrow: Server, limits: str
) -> None:
    before = narrow.shell.json("budget --json")
    error = narrow.shell.fails(2, f"budget {limits}")
    assert (
        f"with a budget of {2 << 20} bytes no model answers: 'demo' needs the least, {6 << 20} bytes" in error
    )
    assert "hint: set at least that; `flexserve recall all`" in error
    assert narrow.shell.json("budget --json") == before


def test_a_small_size_above_which_the_floor_lifts_it_is_no_mistake(narrow: Server) -> None:
    assert narrow.shell.json("budget --floor 8M --json")["soft_bytes"] == 1 << 30
    assert narrow.shell.json("budget 2M --json")["soft_bytes"] == 8 << 20


def test_who_does_not_answer_with_a_budget_is_said(narrow: Server) -> None:
    said = narrow.shell("budget 8M")
    assert said.exit_code == 0
    assert "warning: large does not answer with this budget: it needs 21.0 MB" in said.stderr
    assert "demo does not" not in said.stderr
    assert narrow.shell("budget 32M").stderr == ""
    assert narrow.shell("budget").stderr == ""


def test_ps_says_what_is_held_and_what_may_be(server: Server) -> None:
    server.complete("hello")
    status = server.shell.json("ps --json")
    validate("ps", status)
    assert status["budget"]["held_bytes"] == 8 << 20
    out = server.shell.ok("ps")
    assert "Memory: 8.4 MB held of a budget of 1.1 GB (floor 0 B, hard cap 2.1 GB)" in out
    head = next(line for line in out.splitlines() if line.startswith("MODEL"))
    wanted = [
        "SIZE",
        "RESIDENT",
        "LAZY",
        "PREFIX",
        "KV",
        "SESSIONS",
        "BUDGET",
        "REQUESTS",
        "LAST",
        "USE",
        "STATE",
    ]
    assert head.split() == ["MODEL", *wanted]
