"""The recorded timeline of one cold start, and its drawing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flexserve.bench.files import prepare_model
from flexserve.bench.memory import Condition
from flexserve.bench.plot import draw, require_matplotlib
from flexserve.bench.timeline import SpanTimes, Timeline, record
from flexserve.errors import StorageFailure, Usage
from flexserve.flexmem.processors import PROCESSORS


class Untouched:
    """Free memory as it is."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def prepare(self) -> None:
        self.steps.append("prepare")

    def release(self) -> Condition:
        self.steps.append("release")
        return Condition(first_touch_s_per_gb=0.5, prepare_s=0.0)

    def close(self) -> None:
        pass


SPAN = SpanTimes(0, 1 << 20, 0.0, 0.01, 0.02, 0.02, 0.03)
TIMELINE = Timeline(0.05, 2, 2, (SPAN,), ((0.01, 0.5), (0.02, 2.0), (0.06, 1.0)))


def test_every_byte_of_a_cold_start_is_on_the_timeline_and_every_stage_follows_the_one_before(
    tmp_path: Path,
) -> None:
    model = prepare_model(tmp_path, "tiny-llama-tied", "Q8_0", lambda _text: None)
    memory = Untouched()
    timeline = record(model, [1, 2, 3], memory, threads=len(PROCESSORS), context_tokens=64)
    assert memory.steps == ["prepare", "release"]
    loaded = sum(span.length_bytes for span in timeline.spans)
    assert model.weight_bytes * 0.9 < loaded <= model.source.sealed.stat().st_size
    for s in timeline.spans:
        assert 0 <= s.read_begin_s <= s.read_end_s <= s.decrypt_end_s <= s.place_begin_s <= s.place_end_s
        assert 0 <= s.worker < timeline.workers
    assert timeline.ttft_s > 0
    assert timeline.cores == len(PROCESSORS)
    assert all(busy >= 0 for _, busy in timeline.compute)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_timeline_is_drawn_in_the_format_of_its_name(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="the `bench` extra is not installed")
    path = tmp_path / f"plot.{suffix}"
    draw(TIMELINE, "a cold start", path)
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_a_plot_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the `bench` extra is not installed")
    with pytest.raises(Usage, match="xyz"):
        draw(TIMELINE, "a cold start", tmp_path / "plot.xyz")
    with pytest.raises(StorageFailure, match="nowhere"):
        draw(TIMELINE, "a cold start", tmp_path / "nowhere" / "plot.png")


def test_without_matplotlib_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Usage) as caught:
        require_matplotlib()
    assert "pip install -e '.[bench]'" in caught.value.hint
