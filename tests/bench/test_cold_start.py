"""The cold-start bench on a tiny model: that both sides answer the same and the report says what it should."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jsonschema
import pytest

from flexserve.bench import cold_start, machine
from flexserve.bench.cold_start import ColdStartOptions, Samples
from flexserve.bench.machine import MemoryState
from flexserve.bench.plain import PlainResult
from flexserve.errors import EngineFailure

SCHEMA = Path(__file__).parent.parent.parent / "docs" / "schemas" / "bench-cold-start.json"


def test_a_run_measures_every_side_and_keeps_its_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "prepare", lambda state: None)  # it takes all of the machine's memory
    said: list[str] = []
    options = ColdStartOptions(
        shape="tiny-llama-tied",
        prompt_tokens=8,
        output_tokens=3,
        rounds=1,
        states=(MemoryState.BACKED,),
        directory=tmp_path / "bench",
        threads=1,
    )
    result = cold_start.run(options, said.append)
    jsonschema.validate(result, json.loads(SCHEMA.read_text()))
    report = result["states"]["backed"]
    sides = {"plain_cold_mmap", "plain_cold_read", "plain_cold_direct", "plain_warm"}
    assert set(report["ttft_s"]) == sides | {"sealed_cold", "sealed_sequential", "sealed_resident"}
    assert report["sealed_cold"][0]["load_bytes"] > 1 << 20
    assert result["register_resident_bytes"] == 0
    assert str(result["seeds"][0]) in " ".join(said)


def test_different_answers_end_the_bench() -> None:
    plain = PlainResult(1, 1, 1, 1, 1, [1, 2], 1)
    sealed = cold_start.SealedResult(1, 1, [1, 3], 1, 1, 1, 1, 1, 1, 1)
    with pytest.raises(EngineFailure, match="differ"):
        cold_start._check_tokens([Samples({"plain": [plain]}, {"sealed": [sealed]})])


def test_an_evicted_file_has_no_page_in_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    machine.warm(path)
    machine.evict(path)
    with path.open("rb") as file:
        assert machine.cached_pages(file.fileno()) == 0
        file.read()
        assert machine.cached_pages(file.fileno()) > 0
