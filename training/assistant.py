"""The demo assistant as a task: one English sentence becomes a short answer and exactly one JSON tool call."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache

from .forms import normalise
from .generator import Generator
from .schema import fixed_pieces, read_call
from .task import HERE, Case, Sample, Task

_SPAN = re.compile(r'"(?:text|to|room|app)":"([^"]*)"')
_SYSTEM = (
    "You are a helpful assistant.",
    "You are the assistant of this device.",
    "You are a voice assistant. Answer briefly.",
    "You control alarms, reminders, lights, notifications and messages.",
    "Answer with one short sentence and one JSON call.",
    "Be brief.",
    "You are a home assistant that runs on the device itself.",
    "Turn every request into a tool call.",
    "You are FlexServe's demo assistant.",
    "Today is Monday.",
)


@cache
def handwritten() -> tuple[Case, ...]:
    """The 50 sentences written by hand before the generator existed."""
    lines = (HERE / "handwritten.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple((row["say"], row["call"]) for row in map(json.loads, lines))


def avoided() -> frozenset[str]:
    """The handwritten sentences in the form in which the generator keeps clear of them."""
    return frozenset(normalise(say) for say, _ in handwritten())


def samples(seed: int, held_out: bool) -> Iterator[Sample]:
    """The generator's examples, none of them a sentence written by hand."""
    return (Sample(e.say, e.answer, e.call) for e in Generator(seed, held_out, avoid=avoided()))


def copied(answer: str) -> list[str]:
    """The names and texts in the answer's call."""
    return _SPAN.findall(answer.rpartition("\n")[2])


TASK = Task(
    name="assistant",
    description="Turns English sentences about alarms, reminders, lights, notifications and messages into a short "
    "answer and one JSON tool call. Trained from scratch on generated text.",
    samples=samples,
    read=read_call,
    copied=copied,
    systems=_SYSTEM,
    held_out_seed=71_000,
    fixed=tuple(fixed_pieces()),
    steps=2500,
)
