"""Sides of the workflow benches: what the clock counts, and that what is given back is gone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from flexserve.bench.files import prepare_model
from flexserve.bench.machine import cached_pages
from flexserve.bench.workflow_sides import Asked, Clock, Common, PlainModels
from flexserve.errors import EngineFailure


def test_the_clock_leaves_out_what_the_bench_does_and_jumps_over_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock()
    begin = clock.now()
    now += 2.0
    with clock.stopped():
        now += 30.0
    assert clock.now() - begin == 2.0
    clock.skip(500.0)
    assert clock.now() - begin == 502.0
    with pytest.raises(ValueError, match="inside"), clock.stopped():
        now += 7.0
        raise ValueError("inside")
    assert clock.now() - begin == 502.0


def test_a_plain_model_stays_until_it_is_given_back_with_its_page_cache(tmp_path: Path) -> None:
    model = prepare_model(tmp_path, "tiny-llama", "Q8_0", lambda _text: None)
    sides = PlainModels(Common({"s": model}, 1, 512, tmp_path, Clock()))

    def pages() -> int:
        with model.gguf.open("rb") as file:
            return cached_pages(file.fileno())

    try:
        assert pages() == 0
        sides.ready(["s"])
        asked = Asked("s", (1, 2, 3), 4)
        answers = [sides.ask(asked) for _ in range(2)]
        assert pages() > 0
        assert all(a.begin_s < a.first_s < a.end_s for a in answers)
        (process,) = sides._running.values()
        sides.give_back("s")
        assert pages() == 0
        assert process._popen.returncode is not None
        sides.give_back("s")
        sides.ask(asked)  # without a process that stood ready
        sides._running["s"]._popen.kill()
        with pytest.raises(EngineFailure, match=r"plain llama\.cpp failed"):
            for _ in range(100):
                sides.ask(asked)
    finally:
        sides.close()
