"""`flexserve trace`, over the fake world, which notes recalls, offers and budgets as the Framework does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flexserve.cli import trace
from flexserve.framework import events as ev
from flexserve.framework import trace as framework_trace
from flexserve.framework.machine import Framework
from flexserve.framework.settings import Settings

from ..schemas import validate
from .conftest import Shell
from .memory_server import Server, serving_shell


@pytest.fixture
def server(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving_shell(shell, tmp_path, monkeypatch) as found:
        yield found


def test_every_event_is_a_line_in_its_order(server: Server) -> None:
    server.shell.ok("recall 1M")
    server.shell.ok("budget 2M")
    first, second = server.shell.ok("trace").splitlines()
    assert "PressureRecall call=1 nbytes=1048576 deadline_s=10" in first
    assert "BudgetSet nbytes=2097152" in second


def test_json_is_one_object_a_line_by_its_schema(server: Server) -> None:
    server.shell.ok("recall 1M")
    server.shell.ok("recall all")
    rows = [json.loads(line) for line in server.shell.ok("trace --json").splitlines()]
    for row in rows:
        validate("trace", row)
    assert [row["n"] for row in rows] == [1, 2]


def test_decisions_of_the_framework_are_shown_with_their_reason() -> None:
    framework = Framework(Settings())
    event = ev.PressureRecall(7, 1 << 20)
    lines = list(framework_trace.lines(1, 2.5, event, framework.handle(2.5, event)))
    for line in lines:
        validate("trace", json.loads(line))
    shown = [trace.readable(json.loads(line)) for line in lines]
    assert shown[0].split() == [
        "1",
        "2.500",
        "s",
        "PressureRecall",
        "call=7",
        "nbytes=1048576",
        "deadline_s=null",
    ]
    assert any("chosen: AnswerRecall call=7 chosen_bytes=0" in line for line in shown)
    assert any("given_back: FinishRecall call=7" in line for line in shown)


def test_following_shows_each_line_once_and_begins_anew_after_a_restart(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = server.running.world

    def restart() -> None:
        world.crash()
        world._trace.clear()
        world._events = 0
        world.recall(3)

    todo: list[Callable[[], object]] = [
        lambda: world.recall(1),
        lambda: None,
        lambda: world.recall(2),
        restart,
        lambda: None,
    ]
    steps = iter(todo)

    def instead_of_sleeping(_seconds: float) -> None:
        step = next(steps, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(time, "sleep", instead_of_sleeping)
    result = server.shell("trace --follow --json")
    assert result.exit_code == 130
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["n"], row["event"]["nbytes"]) for row in rows] == [(1, 1), (2, 2), (1, 3)]


@pytest.mark.parametrize("after", ["-1", "x", "1" * 19])
def test_only_numbers_of_events_are_taken(server: Server, after: str) -> None:
    answer = server.admin("GET", f"/admin/trace?after={after}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
