"""`flexserve workflows`, over the fake world."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flexserve.cli.workflows import report_text
from flexserve.core import Workflow, WorkflowReport

from ..schemas import validate
from .conftest import Shell
from .memory_server import Server, serving_shell


@pytest.fixture
def server(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving_shell(shell, tmp_path, monkeypatch) as found:
        yield found


def test_nothing_is_known_at_first_and_then_what_was_asked_twice(server: Server) -> None:
    assert server.shell.ok("workflows").endswith("No workflow is known.\n")
    for _ in range(3):
        server.complete("hello")
    out = server.shell.ok("workflows")
    assert "ID" in out
    assert " demo " in out
    report = server.shell.json("workflows --json")
    validate("workflows", report)
    (one,) = report["workflows"]
    assert (one["steps"], one["next_model"], one["seen"]) == (["demo"], "demo", 2)
    assert server.shell.ok(f"workflows forget {one['id']}") == "1 workflow forgotten\n"
    assert server.shell.json("workflows forget --all --json") == {"forgotten": 0}


@pytest.mark.parametrize("arguments", ["", "--all --anonymous", "12345678 --client a", "--client a --all"])
def test_what_to_forget_is_said_exactly_once(shell: Shell, arguments: str) -> None:
    error = shell("workflows", "forget", *arguments.split())
    assert error.exit_code == 2
    assert "give one ID, or one of --client, --anonymous and --all" in error.stderr


def test_an_id_that_none_has_is_an_error(server: Server) -> None:
    error = server.shell("workflows", "forget", "0badc0de")
    assert error.exit_code == 3 or error.exit_code > 0
    assert "no workflow has the id '0badc0de'" in error.stderr


def test_the_table_names_hits_and_times_and_a_note_comes_first() -> None:
    one = Workflow(
        "0badc0de", "ab" * 16, ("router",), "assistant", 12, 0.93, 10, 8, 5 << 20, 1.25, 3.0, "trip"
    )
    text = report_text(
        WorkflowReport(
            prefetch=True, note="it begins empty", predictions=10, hits=8, saved_s=1.25, workflows=(one,)
        )
    )
    assert text.startswith("note: it begins empty\nPrefetch is on: 8 of 10 predictions came true")
    for word in ("0badc0de", "abababab ", "router", "assistant", "93%", "80%", "1.2 s", "3 s ago", "trip"):
        assert word in text
