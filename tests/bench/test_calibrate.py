"""Calibration, with little of everything: that each rate is measured and the report keeps its schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from flexserve.bench import calibrate, rates
from flexserve.errors import StorageFailure
from flexserve.worlds.linux import calibration
from flexserve.worlds.linux.rates import read_bytes_per_s, together

SCHEMA = Path(__file__).parent.parent.parent / "docs" / "schemas" / "bench-calibrate.json"


@pytest.fixture
def little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less of everything than a trustworthy rate needs."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "READ_BYTES", 2 << 20)
    monkeypatch.setattr(calibration, "PLACE_BYTES", 4 << 20)
    monkeypatch.setattr(rates, "READ_BYTES", 2 << 20)
    monkeypatch.setattr(rates, "PLACE_BYTES", 4 << 20)
    monkeypatch.setattr(rates, "DECRYPT_S", 0.01)
    monkeypatch.setattr(calibrate, "SHAPE", "tiny-llama-tied")


def test_calibration_measures_every_part_and_keeps_its_schema(tmp_path: Path, little: None) -> None:
    result = calibrate.calibrate(tmp_path / "bench", lambda _text: None)
    jsonschema.validate(result, json.loads(SCHEMA.read_text()))
    assert result.pop("other_busy_cores") >= 0  # none on a quiet machine
    assert min(v for v in result.values() if isinstance(v, float)) > 0
    stored = calibration.stored()
    assert stored is not None
    tuning = calibration.choose(stored.rates)
    assert result["tuning"] == {"threads": tuning.threads, "load_workers": tuning.load_workers}
    example = result["example"]
    assert example["lower_bound_s"] == max(example[f"{part}_s"] for part in ("io", "cpu", "compute"))


def test_a_file_shorter_than_a_segment_measures_no_reading(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(4096))
    with pytest.raises(StorageFailure, match="too short"):
        read_bytes_per_s(path, 1 << 20, depth=1)


def test_an_error_in_one_reading_thread_is_the_error_of_the_measurement(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.write_bytes(bytes(2 << 20))
    with pytest.raises(ValueError, match="one of two"):
        together(2, _fail_second)
    assert read_bytes_per_s(path, 1 << 20, depth=2, direct=False) > 0


def _fail_second(number: int) -> None:
    if number == 1:
        raise ValueError("one of two")


def test_placing_is_the_better_of_its_two_ways() -> None:
    move = rates.Placing(
        copy_s_per_gb=0.5, move_s_per_gb=0.1, first_touch_huge_s_per_gb=0.2, first_touch_small_s_per_gb=1
    )
    assert move.bytes_per_s == pytest.approx(1e9 / 0.3)
    copy = rates.Placing(
        copy_s_per_gb=0.2, move_s_per_gb=0.1, first_touch_huge_s_per_gb=0.2, first_touch_small_s_per_gb=1
    )
    assert copy.bytes_per_s == pytest.approx(1e9 / 0.2)
    neither = rates.Placing(
        copy_s_per_gb=0.4, move_s_per_gb=None, first_touch_huge_s_per_gb=0.2, first_touch_small_s_per_gb=1
    )
    assert neither.bytes_per_s == pytest.approx(1e9 / 0.4)
