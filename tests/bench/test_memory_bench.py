"""The memory bench on a tiny model: that every part is measured as it says, and the report follows its schema."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexserve.bench import background, decisions, lazy, memory, memory_bench, recalls
from flexserve.bench.hog import STEP_BYTES, Hog
from flexserve.bench.memory_bench import PARTS, MemoryOptions, headline, recall_row
from flexserve.bench.recalls import RecallTimes
from flexserve.errors import EngineFailure, Usage
from flexserve.normal.policy import MIB

from ..schemas import validate


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryOptions:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(lazy, "ARENA_BYTES", 4 << 20)
    monkeypatch.setattr(decisions, "SEGMENTS", (400,))
    monkeypatch.setattr(memory, "SETTLE_S", 0.0)
    monkeypatch.setattr(memory, "BLOCK_BYTES", 4 << 20)
    monkeypatch.setattr(memory_bench, "REFILL_SPARE_BYTES", 0)
    monkeypatch.setattr(recalls, "SIZES", {"128 MiB": 1 << 20, "1 GiB": 1 << 40, "all": 1 << 60})
    return MemoryOptions(
        "tiny-llama", prompt_tokens=8, session_tokens=64, rounds=1, directory=tmp_path, threads=1
    )


def test_every_part_is_measured_and_the_report_keeps_its_schema(options: MemoryOptions) -> None:
    said: list[str] = []
    result = memory_bench.run(options, said.append)
    validate("bench-memory", result)
    assert f"seed {result['seed']}" in said
    assert result["pressure"] is None  # only if asked for
    rows = {(row["asked"], row["during"]): row for row in result["recall"]}
    assert list(rows) == [(a, d) for d in ("idle", "generating") for a in ("128 MiB", "all")]
    assert all(row["freed_bytes"] >= 1 << 20 for row in rows.values())
    assert rows["all", "idle"]["freed_bytes"] > rows["128 MiB", "idle"]["freed_bytes"]
    assert all(row["async_ms"]["median"] <= row["two_stage_ms"]["median"] for row in rows.values())
    assert all((row["sync_ms"] is None) == (row["during"] == "generating") for row in rows.values())
    cached = {(row["source"], row["fraction"]): row for row in result["cached"]}
    for source in ("page_cache", "storage"):
        resident = [cached[source, f]["resident_bytes"] for f in (0.0, 0.25, 0.5, 0.75, 1.0)]
        assert resident == sorted(resident)
        assert resident[0] == 0
        assert cached[source, 1.0]["loaded_bytes"] == 0
        assert cached[source, 0.0]["loaded_bytes"] > cached[source, 0.75]["loaded_bytes"] > 0
        assert cached[source, 1.0]["vs_resident"] == 1.0
    assert {row["event"] for row in result["decision"]} >= {"recall of all", "request"}
    for key in (
        "decision_ms",
        "recall_gbps",
        "refill_gbps_per_core",
        "lazy_gbps",
        "session_restore_vs_recompute",
    ):
        assert result[key] > 0


def test_one_part_can_be_measured_alone(options: MemoryOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    only = MemoryOptions("tiny-llama", rounds=1, parts=("lazy",), directory=options.directory)
    result = memory_bench.run(only, lambda _text: None)
    validate("bench-memory", result)
    assert [part for part in PARTS if result[part] is not None] == ["lazy"]
    assert result["recall_gbps"] is None


@pytest.mark.slow
def test_under_pressure_every_side_gives_the_same_answer(
    options: MemoryOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing is pressed: this machine is not ours. What is measured and how is the same.
    monkeypatch.setattr(background, "press", lambda _hog, held, _left, _ours=0: held)
    only = MemoryOptions(
        "tiny-llama", prompt_tokens=8, parts=("pressure",), directory=options.directory, threads=1
    )
    result = memory_bench.run(only, lambda _text: None)
    validate("bench-memory", result)
    starts = result["pressure"]["starts"]
    assert [one["side"] for one in starts] == [s for s in background.SIDES for _ in background.LEVELS]
    assert all(one["resident_bytes"] == 0 for one in starts if one["side"] == "sealed_no_cache")
    assert all(one["resident_bytes"] > 0 for one in starts if one["side"] == "sealed")
    assert result["pressure"]["lazy"]["handed_bytes"] > 0
    assert result["pressure"]["lazy"]["same_answer"]


def test_a_part_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(Usage, match="no part is called 'fill'"):
        MemoryOptions(parts=("fill",))
    with pytest.raises(Usage, match="no part is to be measured"):
        MemoryOptions(parts=())


def test_the_headline_takes_each_number_from_its_row() -> None:
    def times(seconds: float, freed: int) -> RecallTimes:
        return RecallTimes(freed, 0, freed, seconds / 4, seconds / 2, seconds, seconds * 2)

    found: dict[str, Any] = dict.fromkeys(PARTS)
    found["recall"] = [
        recall_row("128 MiB", "idle", [times(0.010, 128 * MIB)]),
        recall_row("all", "idle", [times(0.1, 10**9), times(0.2, 10**9), times(0.05, 10**9)]),
        recall_row("all", "generating", [times(9.0, 10**9)]),
    ]
    found["cached"] = [
        {"source": source, "fraction": fraction, "vs_resident": number}
        for source, fraction, number in (
            ("storage", 0.5, 9.0),
            ("page_cache", 0.5, 1.2),
            ("page_cache", 0.75, 1.1),
        )
    ]
    numbers = headline(found)
    assert numbers["recall_gbps"] == pytest.approx(10.0)
    assert numbers["recall_first_byte_ms"] == pytest.approx(5.0)
    assert numbers["async_return_ms_128mib"] == pytest.approx(2.5)
    assert numbers["ttft_half_cached_vs_resident"] == 1.2
    assert numbers["ttft_three_quarters_cached_vs_resident"] == 1.1
    assert numbers["lazy_gbps"] is None


def test_the_longest_gap_counts_from_the_recall_on() -> None:
    assert recalls.gaps([0.0, 5.0, 6.0, 7.0, 10.0, 11.0], 7.5) == (1.0, 3.0)


def test_a_hog_really_holds_what_it_says_and_is_the_first_to_be_killed() -> None:
    with Hog() as hog:
        before = background.resident_bytes(hog._popen.pid) if hog.hold(0) == 0 else 0
        assert hog.hold(2 * STEP_BYTES + 1) == 2 * STEP_BYTES
        assert background.resident_bytes(hog._popen.pid) - before > 1.5 * STEP_BYTES
        assert Path(f"/proc/{hog._popen.pid}/oom_score_adj").read_text() == "1000\n"
        assert hog.hold(STEP_BYTES) == STEP_BYTES
        hog._popen.kill()
        hog._popen.wait()
        with pytest.raises(EngineFailure, match="was killed"):
            hog.hold(0)


def test_a_level_that_this_machine_cannot_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "meminfo_bytes", lambda _key: 600 * MIB)
    with Hog() as hog, pytest.raises(EngineFailure, match="712 MiB of available memory are needed"):
        background.press(hog, 0, 200 * MIB)


def test_what_is_ours_is_part_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    available = iter([1112 * MIB] * 2)
    monkeypatch.setattr(background, "meminfo_bytes", lambda _key: next(available))
    with Hog() as hog:
        assert background.press(hog, 0, 500 * MIB) == 64 * MIB  # 100 MiB in whole steps
        assert background.press(hog, 64 * MIB, 900 * MIB, ours=400 * MIB) == 128 * MIB


def test_a_hog_ends_with_whoever_started_it() -> None:
    code = (
        "import os, sys\nfrom flexserve.bench.hog import Hog\nhog = Hog()\nhog.hold(0)\n"
        "print(hog._popen.pid, flush=True)\nos._exit(1)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False, timeout=60
    )
    pid = int(found.stdout)
    fd = _pidfd(pid)
    if fd is not None:
        import select

        assert select.select([fd], [], [], 60)[0]
        os.close(fd)


def _pidfd(pid: int) -> int | None:
    """None: it has ended already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
