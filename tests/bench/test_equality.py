"""The equality bench on a tiny model: that it loses what it says, and would tell a different answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexserve.bench import equality
from flexserve.bench.equality import EqualityOptions
from flexserve.errors import Usage

from ..schemas import validate


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EqualityOptions:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(equality, "MOST_SEGMENTS", 2)
    return EqualityOptions("tiny-llama", prompt_tokens=8, tokens=1000, segments=2, seed=5, directory=tmp_path)


def test_an_answer_in_a_storm_is_the_undisturbed_one(options: EqualityOptions) -> None:
    said: list[str] = []
    result = equality.run(options, said.append)
    validate("bench-equality", result)
    assert result["equal"]
    assert result["equal_tokens"] == result["tokens"] == 1000
    assert result["recalls"] >= 1
    assert result["lost_segments"] >= 1
    assert "seed 5" in said


def test_too_little_to_compare_is_refused() -> None:
    with pytest.raises(Usage):
        EqualityOptions(tokens=1)
