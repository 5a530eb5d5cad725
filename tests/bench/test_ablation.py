"""The ablation on a tiny model: its steps, what they share, and the schema of the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexserve.bench import ablation
from flexserve.bench.ablation import STEPS, AblationOptions
from flexserve.errors import Usage

from ..schemas import validate


@pytest.mark.parametrize("quant", ["Q4_0", "F16"])
def test_each_step_is_measured_on_top_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    options = AblationOptions("tiny-llama-tied", quant, 8, 0.9, rounds=2, directory=tmp_path / "b", threads=1)
    result = ablation.run(options, lambda _text: None)
    validate("bench-ablation", result)
    assert [*result["steps"], *result["skipped"]] == list(STEPS)
    assert list(result["skipped"]) == ([] if result["repacked_bytes"] else ["layout"])
    assert result["steps"]["sequential"]["vs_sequential"] == 1.0
    for one in result["rounds"]:
        resident, loaded = one["resident_bytes"], one["loaded_bytes"]
        assert resident["sequential"] == resident["pipeline"] == 0 <= resident["prefix"]
        assert min(loaded.values()) > 0
        if quant == "F16":  # the other one is too small to take a part of it
            assert resident["prefix"] > 0
            assert loaded["pipeline"] > loaded["prefix"]
    steps = result["steps"]
    assert steps["prefix"]["vs_step_before"] == pytest.approx(
        steps["prefix"]["ttft_s"]["median"] / steps["pipeline"]["ttft_s"]["median"]
    )


@pytest.mark.parametrize("prefix", [0.0, 1.0, -1.0])
def test_a_prefix_that_is_none_or_all_is_refused(prefix: float) -> None:
    with pytest.raises(Usage, match="prefix"):
        AblationOptions(prefix=prefix)
