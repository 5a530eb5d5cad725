"""The neighbours: that they do what they say, and that each side keeps or gives back what it should."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flexserve.bench import neighbours
from flexserve.bench.neighbour import (
    BLOCK_BYTES,
    Neighbour,
    make_database,
    make_file,
    random_read,
    sqlite_query,
)
from flexserve.bench.neighbours import SIDES, NeighboursOptions, against_none
from flexserve.errors import EngineFailure, Usage

from ..schemas import validate


def test_the_database_has_an_index_and_about_the_size_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "orders.sqlite"
    make_database(path, 1 << 20)
    assert 0.7 < path.stat().st_size / (1 << 20) < 1.4
    assert list(tmp_path.iterdir()) == [path]
    with closing(sqlite3.connect(path)) as db:
        plan = str(
            db.execute("EXPLAIN QUERY PLAN SELECT sum(cents) FROM orders WHERE customer = 1").fetchall()
        )
        assert "by_customer" in plan
    query = sqlite_query(path)
    assert [query() for _ in range(100)] == [1] * 100


def test_the_reader_reads_whole_blocks(tmp_path: Path) -> None:
    make_file(tmp_path / "data", 1 << 20)
    read = random_read(tmp_path / "data")
    assert [read() for _ in range(50)] == [BLOCK_BYTES] * 50


@pytest.mark.parametrize(
    ("make", "where"), [(make_file, "os.urandom"), (make_database, "random.Random.randbytes")]
)
def test_data_that_was_interrupted_leaves_no_file(
    make: Callable[[Path, int], None], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "data", 1 << 20)
    assert not list(tmp_path.iterdir())


def test_a_neighbour_works_until_it_is_closed(tmp_path: Path) -> None:
    make_file(tmp_path / "data", 1 << 20)
    with Neighbour("reader", tmp_path / "data") as one:
        rates = [one.rate()]
        while not rates[-1]:
            rates.append(one.rate())
        one._popen.kill()
        with pytest.raises(EngineFailure, match="the neighbour reader has ended"):
            for _ in range(1000):
                one.rate()
    with pytest.raises(EngineFailure, match="the neighbour sqlite did not start"):
        Neighbour("sqlite", tmp_path / "absent")


def test_every_side_keeps_or_gives_back_as_its_name_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(neighbours, "press", lambda _hog, held, _left, _ours: held)  # the machine is not ours
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    directory = tmp_path / "bench"
    options = NeighboursOptions(
        "tiny-llama",
        prompt_tokens=8,
        data_bytes=1 << 20,
        every_s=0.1,
        timer_s=0.01,
        measure_s=0.3,
        warm_s=0.0,
        directory=directory,
        threads=1,
    )
    result = neighbours.run(options, lambda _text: None)
    validate("bench-neighbours", result)
    sides: dict[str, dict[str, Any]] = result["sides"]
    assert tuple(sides) == SIDES
    assert sides["none"]["ttft_s"] is None
    assert sides["no_cache"]["resident_bytes"] < result["weight_bytes"] / 2
    assert sides["always_cache"]["resident_bytes"] > result["weight_bytes"] / 2
    assert sides["timer"]["resident_bytes"] < sides["always_cache"]["resident_bytes"]
    made = {path.name: path.stat().st_mtime_ns for path in directory.glob("neighbour-*")}
    assert len(made) == 2
    neighbours.prepare_data(options, lambda _text: None)
    assert made == {path.name: path.stat().st_mtime_ns for path in directory.glob("neighbour-*")}


def test_rates_are_shares_of_what_the_applications_do_alone() -> None:
    def row(queries: float, read: float) -> dict[str, Any]:
        return {"sqlite_queries_per_s": queries, "reader_bytes_per_s": read}

    found = against_none({"none": row(200.0, 0.0), "timer": row(100.0, 5.0)})
    assert (found["timer"]["sqlite_vs_none"], found["timer"]["reader_vs_none"]) == (0.5, None)
    assert against_none({"timer": row(1.0, 1.0)})["timer"]["sqlite_vs_none"] is None


@pytest.mark.parametrize(
    "wrong",
    [{"sides": ("sometimes",)}, {"sides": ()}, {"timer_s": 20.0}, {"every_s": 100.0}, {"timer_s": 0.0}],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(Usage):
        NeighboursOptions(**wrong)
