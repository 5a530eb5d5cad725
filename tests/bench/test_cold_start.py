"""The cold-start bench on a tiny model: that both sides answer the same and the report says what it should."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from flexserve.bench import cold_start, memory
from flexserve.bench.cold_start import (
    ALL_SIDES,
    LAYOUT_SIDES,
    REPACK_SIDES,
    UNHARDENED_SIDES,
    ColdStartOptions,
)
from flexserve.bench.memory import Condition, FreeMemory, MemoryState
from flexserve.bench.sides import Sample, SealedSide
from flexserve.errors import EngineFailure, Usage

SCHEMA = Path(__file__).parent.parent.parent / "docs" / "schemas" / "bench-cold-start.json"


class Untouched:
    """Free memory as it is: the real states take all of the machine's."""

    def __init__(self, state: MemoryState, log: list[str]) -> None:
        self._state, self._log = state, log

    def prepare(self) -> None:
        self._log.append(f"prepare {self._state}")

    def release(self) -> Condition:
        self._log.append("release")
        return Condition(first_touch_s_per_gb=0.5, prepare_s=0.0)

    def close(self) -> None:
        self._log.append("close")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was done to memory, in order."""
    log: list[str] = []

    def untouched(state: MemoryState, need_bytes: int) -> FreeMemory:
        assert need_bytes > 1 << 30
        return Untouched(state, log)

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(memory, "free_memory", untouched)
    return log


def _options(tmp_path: Path, **changes: Any) -> ColdStartOptions:
    options = ColdStartOptions(
        shape="tiny-llama-tied",
        prompt_tokens=8,
        output_tokens=3,
        rounds=2,
        directory=tmp_path / "bench",
        threads=1,
    )
    return dataclasses.replace(options, **changes)


def test_a_run_measures_every_side_in_every_state_and_keeps_its_schema(
    tmp_path: Path, steps: list[str]
) -> None:
    said: list[str] = []
    result = cold_start.run(_options(tmp_path), said.append)
    jsonschema.validate(result, json.loads(SCHEMA.read_text()))
    assert set(result["skipped"]) <= {*REPACK_SIDES, *LAYOUT_SIDES, "plain_cold_mlock"}
    for state in result["states"].values():
        assert set(state["sides"]) == {*ALL_SIDES} - {*UNHARDENED_SIDES} - set(result["skipped"])
        first, second = (r["order"] for r in state["rounds"])
        assert first == second[::-1]
        assert all(str(r["seed"]) in "\n".join(said) for r in state["rounds"])
    assert steps[0] == "prepare idle"
    count = 2 * len(result["states"]["idle"]["sides"])
    assert steps.count("prepare idle") == steps.count("prepare backed") == count
    assert steps.count("release") == 2 * count
    assert result["register_resident_bytes"] == 0
    cold = result["states"]["backed"]["sides"]["sealed_cold"]["samples"]
    assert all(s["read_bytes"] > 1 << 20 and s["cpu_s"] >= s["compute_s"] > 0 for s in cold)
    resident = result["states"]["backed"]["sides"]["sealed_resident"]["samples"]
    assert all(s["read_bytes"] == 0 for s in resident)
    expected = {
        "cold_vs_plain_cold",
        "cold_vs_plain_process_warm",
        "cold_vs_resident",
        "pipelined_vs_sequential",
        "cold_vs_lower_bound",
        "long_cold_vs_resident",
        "long_cold_vs_lower_bound",
        "decode_vs_plain",
        "prefill_vs_plain",
    }
    if not result["skipped"]:
        expected |= {f"layout_{name}" for name in expected if "long" not in name and "pipelined" not in name}
    assert set(result["ratios"]) == set(result["ratios_idle"]) == expected
    best = result["ratios"]["cold_vs_plain_cold"]["denominator"]
    medians = {n: s["ttft_s"]["median"] for n, s in result["states"]["backed"]["sides"].items()}
    assert best["median"] == min(v for n, v in medians.items() if n.startswith("plain_cold"))


def test_a_quantisation_that_llama_cpp_repacks_is_measured_repacked_too(
    tmp_path: Path, steps: list[str]
) -> None:
    wanted = ("plain_cold_mmap", "plain_cold_repack", "plain_warm_repack", "sealed_cold", *LAYOUT_SIDES)
    options = _options(tmp_path, quant="Q4_0", rounds=1, states=(MemoryState.BACKED,), sides=wanted)
    result = cold_start.run(options, lambda _text: None)
    jsonschema.validate(result, json.loads(SCHEMA.read_text()))
    if not result["repacked_bytes"]:
        pytest.skip(f"llama.cpp repacks nothing here: {result['skipped']}")
    assert set(result["states"]["backed"]["sides"]) == set(wanted)
    ratios = result["ratios"]
    assert ratios["layout_decode_vs_plain"]["denominator"]["side"] == "plain_warm_repack"
    assert ratios["layout_cold_vs_plain_cold"]["numerator"]["side"] == "sealed_cold_layout"
    assert result["ratios_idle"] is None
    assert not {"pipelined_vs_sequential", "cold_vs_resident"} & set(ratios)
    copy = options.directory / "tiny-llama-tied-Q4_0.flexcopy"
    made = copy.stat().st_mtime_ns
    cold_start.run(options, lambda _text: None)
    assert copy.stat().st_mtime_ns == made  # it still fits: nothing is made twice


def test_the_cost_of_hardening_is_measured_against_the_same_world_without_it(
    tmp_path: Path, steps: list[str]
) -> None:
    wanted = ("sealed_cold", "sealed_resident", *UNHARDENED_SIDES)
    options = _options(tmp_path, rounds=1, states=(MemoryState.BACKED,), sides=wanted)
    result = cold_start.run(options, lambda _text: None)
    jsonschema.validate(result, json.loads(SCHEMA.read_text()))
    assert result["ratios"]["hardening_cold"]["denominator"]["side"] == "unhardened_cold"
    assert result["ratios"]["hardening_decode"]["ratio"] > 0


def test_a_side_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(Usage, match="plain_tepid"):
        ColdStartOptions(sides=("plain_tepid",))


def test_different_answers_end_the_bench(tmp_path: Path, steps: list[str]) -> None:
    class Liar(SealedSide):
        def go(self) -> Sample:
            sample = super().go()
            changed = (*sample.token_ids[:-1], sample.token_ids[-1] ^ 1)
            return dataclasses.replace(sample, token_ids=changed)

    options = _options(tmp_path, rounds=1, sides=("plain_cold_mmap", "sealed_cold"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cold_start, "SealedSide", Liar)
        with pytest.raises(EngineFailure, match="sealed_cold and plain_cold_mmap answered"):
            cold_start.run(options, lambda _text: None)
