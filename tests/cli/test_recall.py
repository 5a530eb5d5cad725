"""`flexserve recall`, over the fake world: sizes, what is printed, and what stays."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import click
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexserve.cli.sizes import Size

from ..schemas import validate
from .conftest import Shell
from .memory_server import Server, serving_shell


@pytest.fixture
def server(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving_shell(shell, tmp_path, monkeypatch) as found:
        yield found


def test_everything_is_given_back_and_the_next_answer_is_the_same(server: Server) -> None:
    before = server.complete("hello")
    out = server.shell.ok("recall all")
    assert out.startswith("chosen  8.4 MB of everything after ")
    assert "\nfreed   8.4 MB, the first after " in out
    assert out.endswith("\nbudget  0 B, of which 0 B are held\n")
    assert server.complete("hello") == before


def test_json_follows_its_schema_and_says_what_was_asked(server: Server) -> None:
    server.complete("hello")
    some = server.shell.json("recall 1M --json --deadline 0.5")
    validate("recall", some)
    assert (some["asked_bytes"], some["chosen_bytes"], some["freed_bytes"]) == (1 << 20, 1 << 20, 1 << 20)
    assert some["budget"]["held_bytes"] == 7 << 20
    everything = server.shell.json("recall all --json")
    validate("recall", everything)
    assert (everything["asked_bytes"], everything["freed_bytes"]) == (None, 7 << 20)


def test_what_is_below_the_floor_stays(server: Server) -> None:
    server.complete("hello")
    server.shell.ok("budget --floor 3M")
    assert server.shell.json("recall all --json")["freed_bytes"] == 5 << 20
    assert server.shell.json("ps --json")["models"][0]["resident_bytes"] == 3 << 20


@pytest.mark.parametrize("size", ["lots", "-1", "1X", "", "1e9", "2000000000G", "\u0661M", "1 2"])
def test_what_is_no_size_is_refused(shell: Shell, size: str) -> None:
    error = shell("recall", "--", size)
    assert error.exit_code == 2
    assert "is not a size like 512M, 1.5G or 1GB, or all" in error.stderr or "any machine" in error.stderr


@pytest.mark.parametrize("deadline", ["0", "-1", "601", "soon"])
def test_a_deadline_out_of_range_is_refused(shell: Shell, deadline: str) -> None:
    assert shell(f"recall all --deadline {deadline}").exit_code == 2


def test_without_a_server_it_says_how_to_start_one(shell: Shell, tmp_path: Path) -> None:
    for verb in ("recall all", "budget", "trace"):
        error = shell.fails(3, f"{verb} --admin-socket {tmp_path / 'none.sock'}")
        assert "hint: start one with `flexserve serve`" in error


@given(
    st.integers(0, 1 << 20), st.integers(0, 999), st.sampled_from(["", "k", "M", "G", "kB", "GiB", "gb", "B"])
)
def test_sizes_are_exact(whole: int, thousandths: int, unit: str) -> None:
    text = f"{whole}.{thousandths:03}{unit}"
    base = 1000 if unit.lower() in ("kb", "gb") else 1024
    power = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3}[unit[:1].lower()]
    assert Size().convert(text, None, None) == int(Fraction(whole * 1000 + thousandths, 1000) * base**power)


def test_all_is_a_size_only_where_it_makes_sense() -> None:
    assert Size(allow_all=True).convert("ALL", None, None) is None
    with pytest.raises(click.BadParameter, match=r"1GB$"):
        Size().convert("all", None, None)


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("recall", "nonsense"),
        ("recall", '{"size_bytes": -1}'),
        ("recall", '{"size_bytes": 1e3}'),
        ("recall", '{"size_bytes": 1, "deadline_s": 0}'),
        ("recall", '{"bytes": 1}'),
        ("budget", '{"soft_bytes": -1}'),
        ("budget", '{"hard_bytes": 99999999999999999999}'),
        ("budget", '{"floor_bytes": 2, "hard_bytes": 1}'),
    ],
)
def test_a_body_that_makes_no_sense_is_refused(server: Server, endpoint: str, body: str) -> None:
    answer = server.admin("POST", f"/admin/{endpoint}", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_request"


def test_the_verbs_about_memory_are_not_on_the_network(server: Server) -> None:
    for method, path in (("POST", "recall"), ("POST", "budget"), ("GET", "trace")):
        answer = httpx.request(method, f"{server.url}/admin/{path}", timeout=30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
