"""What a decision of the Framework costs with many models whose segments are scattered: every second one is missing.

The Framework alone, in processor time of this thread, so other programs do not count. Prints nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass

from ..framework import events as ev
from ..framework.machine import Framework
from ..framework.order import Range
from ..framework.settings import Settings
from ..framework.tables import SegmentTrigger
from ..framework.weights import Part

MODELS = 20
SEGMENTS = (10_000, 200_000)  # of all models together; the first is what is promised
UNIT_BYTES = 1 << 20
ROUNDS = 5
PIECE = 256  # of a report: nobody reports more at a time


@dataclass(frozen=True)
class Decision:
    """One kind of event, with `segments` in all: the longest decision of a round, and that of the best round."""

    event: str
    segments: int
    stretches: int
    seconds: float


def measure() -> list[Decision]:
    """Each kind of event with each number of segments."""
    found: dict[tuple[str, int], float] = {}
    for segments in SEGMENTS:
        for _ in range(ROUNDS):
            for event, seconds in _round(segments // MODELS).items():
                best = found.get((event, segments), seconds)
                found[event, segments] = min(best, seconds)  # what was interrupted is no decision's cost
    return [Decision(event, n, n // 2, seconds) for (event, n), seconds in found.items()]


def _round(segments: int) -> dict[str, float]:
    """Models with so many segments each. Every second one is there; half of these, then all are recalled, then
    memory is offered, and a request makes all of one model wanted."""
    size = segments * UNIT_BYTES
    everything = MODELS * size
    framework = Framework(Settings(budget_bytes=everything, cap_bytes=everything, floor_bytes=0, lazy=False))
    scattered = tuple(Range(n, 1) for n in range(1, segments, 2))
    for model in _names():
        framework.handle(0.0, ev.ModelRegistered(model, (Part(0, segments, UNIT_BYTES, size),), 1024, 4096))
        framework.handle(0.0, ev.SegmentsChanged(model, SegmentTrigger.PLACED, scattered))
    there = MODELS * len(scattered) * UNIT_BYTES
    collects = gc.isenabled()
    gc.disable()
    try:
        return {
            "recall of a half": _seconds(framework, ev.PressureRecall(1, there // 2, None)),
            "recall of all": _seconds(framework, ev.PressureRecall(2, everything, None)),
            "report": max(
                _seconds(framework, ev.SegmentsChanged(model, SegmentTrigger.RECALLED, piece))
                for model in _names()
                for piece in _pieces(scattered)
            ),
            "offer": _seconds(framework, ev.Offer(everything)),
            "request": _seconds(framework, ev.RequestArrived("r", "m0", None)),
        }
    finally:
        if collects:
            gc.enable()


def _names() -> Iterator[str]:
    return (f"m{number}" for number in range(MODELS))


def _pieces(ranges: tuple[Range, ...]) -> Iterator[tuple[Range, ...]]:
    return (ranges[at : at + PIECE] for at in range(0, len(ranges), PIECE))


def _seconds(framework: Framework, event: ev.Event) -> float:
    begin = time.thread_time()
    framework.handle(1.0, event)
    return time.thread_time() - begin
