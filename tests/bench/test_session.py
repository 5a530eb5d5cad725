"""The measurement of sessions, on a model so small that only its form can be checked."""

from __future__ import annotations

from pathlib import Path

from flexserve.bench.generate import write_model
from flexserve.bench.session import measure

from ..sealed_fixtures import SMALL


def test_it_measures_every_step_of_the_same_state(tmp_path: Path) -> None:
    gguf = tmp_path / "m.gguf"
    write_model(SMALL, "Q8_0", gguf, 0)
    times = measure(gguf, tmp_path, threads=1, tokens=100)
    assert times.tokens == 100
    assert times.state_bytes > 100 * SMALL.layers * 2 * SMALL.kv_heads * SMALL.key_length * 2
    steps = (times.compute_s, times.keep_s, times.resume_s, times.save_s, times.restore_s)
    assert all(s > 0 for s in (*steps, times.restore_cold_s))
    assert times.session_restore_vs_recompute == times.restore_cold_s / times.compute_s
    assert list(tmp_path.iterdir()) == [gguf]
