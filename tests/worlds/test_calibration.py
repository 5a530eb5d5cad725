"""How many threads compute and load: what is chosen from which rates, and what is remembered of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexserve.cli.tuning import tuned
from flexserve.errors import EngineFailure, StorageFailure
from flexserve.flexmem.processors import PROCESSORS
from flexserve.worlds.linux import calibration
from flexserve.worlds.linux.calibration import Calibration, Rates, Tuning, choose
from flexserve.worlds.linux.doctor import State, calibration_line

GB = 1e9
RATE = st.floats(1e6, 1e12)
BY_COUNT = st.dictionaries(st.integers(1, 64), RATE, min_size=1)


def here(rates: Rates) -> Calibration:
    return Calibration(tuple(sorted(PROCESSORS)), calibration.processor_name(), rates)


USUAL = Rates({1: 0.7 * GB, 2: 1.1 * GB, 4: 1.12 * GB}, 9.9 * GB, 4.1 * GB, {1: 8 * GB, 2: 16 * GB})


def test_one_worker_more_than_reads_keep_storage_busy_decrypts_what_has_come() -> None:
    assert choose(USUAL) == Tuning(threads=2, load_workers=3)


def test_processors_that_share_a_core_do_not_both_compute() -> None:
    shared = Rates(USUAL.read, USUAL.decrypt, USUAL.place, {4: 30 * GB, 8: 31 * GB})
    assert choose(shared).threads == 4


def test_where_storage_is_faster_than_a_thread_decrypts_more_of_them_do() -> None:
    fast = Rates({1: 6 * GB, 2: 12 * GB}, 3 * GB, 3 * GB, {4: 4 * GB})
    assert choose(fast).load_workers == calibration.MOST_WORKERS
    slow = Rates({1: 0.1 * GB}, 3 * GB, 3 * GB, {4: 4 * GB})
    assert choose(slow).load_workers == 2


@given(BY_COUNT, RATE, RATE, BY_COUNT)
def test_whatever_the_rates_are_there_is_a_choice_within_its_limits(
    read: dict[int, float], decrypt: float, place: float, compute: dict[int, float]
) -> None:
    tuning = choose(Rates(read, decrypt, place, compute))
    assert calibration.FEWEST_WORKERS <= tuning.load_workers <= calibration.MOST_WORKERS
    assert tuning.threads in compute
    assert compute[tuning.threads] >= calibration.ENOUGH * max(compute.values())


def test_what_was_measured_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "state" / "calibration.json"
    assert calibration.stored(path) is None
    calibration.store(here(USUAL), path)
    assert calibration.stored(path) == here(USUAL)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "other",
    [
        Calibration((1000,), calibration.processor_name(), USUAL),
        Calibration(here(USUAL).processors, "another processor", USUAL),
        here(Rates({}, 1.0, 1.0, {1: 1.0})),
        here(Rates({1: 0.0}, 1.0, 1.0, {1: 1.0})),
        here(Rates({1: 1.0}, 1.0, 1.0, {0: 1.0})),
    ],
    ids=["other processors", "another processor", "no reading", "a rate of 0", "no threads"],
)
def test_what_does_not_hold_here_counts_as_not_measured(tmp_path: Path, other: Calibration) -> None:
    path = tmp_path / "calibration.json"
    calibration.store(other, path)
    assert calibration.stored(path) is None


def test_a_damaged_file_counts_as_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    for content in (b"", b"{}", b"\xff" * 100, b"[" * 100_000):
        path.write_bytes(content)
        assert calibration.stored(path) is None


def test_doctor_says_what_a_server_would_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert calibration_line().state == State.UNUSED
    calibration.store(here(USUAL))
    line = calibration_line()
    assert (line.state, line.found) == (
        State.OK,
        "2 threads compute and 3 load (storage 1.1 GB/s; one thread decrypts 9.9 GB/s and places 4.1 GB/s)",
    )


@pytest.mark.parametrize("busy", [True, False])
def test_a_server_stores_what_it_measured_undisturbed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    def check() -> None:
        if busy:
            raise EngineFailure("other programs use the processors")

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "check_undisturbed", check)
    monkeypatch.setattr(calibration, "measure", lambda _sample: here(USUAL))
    assert tuned(None, None, None) == calibration.default()
    chosen = tuned(None, 7, tmp_path / "any")
    assert chosen == Tuning(calibration.default().threads if busy else 2, 7)
    assert (calibration.stored() is None) == busy
    assert tuned(5, 6, tmp_path / "any") == Tuning(5, 6)


def test_a_process_that_gets_no_processor_time_does_not_count_as_undisturbed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibration, "UNDISTURBED", 2.0)
    with pytest.raises(EngineFailure, match="other programs use"):
        calibration.check_undisturbed()
    monkeypatch.setattr(calibration, "UNDISTURBED", 0.0)
    calibration.check_undisturbed()


def test_every_rate_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "READ_BYTES", 2 << 20)
    monkeypatch.setattr(calibration, "PLACE_BYTES", 4 << 20)
    monkeypatch.setattr(calibration, "DECRYPT_S", 0.01)
    path = tmp_path / "file"
    path.write_bytes(bytes(2 << 20))
    found = calibration.measure(path)
    assert set(found.rates.read) == set(calibration.DEPTHS)
    assert len(PROCESSORS) in found.rates.compute
    path.write_bytes(bytes(4096))
    with pytest.raises(StorageFailure, match="too short"):
        calibration.measure(path)
