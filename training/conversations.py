"""Puts the generator's examples into conversations: sometimes a system message, sometimes earlier turns."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from .generator import Generator
from .tokenizer import Turn

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


def conversations(generator: Generator, seed: int) -> Iterator[list[Turn]]:
    """Endless conversations: 12 % begin with a system message, 8 % have more than one exchange."""
    rng = Random(f"{seed}/conversations")
    while True:
        turns: list[Turn] = []
        if rng.random() < 0.12:
            text = rng.choice(_SYSTEM) if rng.random() < 0.8 else generator.words.salad(rng, 12)
            turns.append(Turn("system", text))
        exchanges = 1 if rng.random() < 0.92 else rng.randint(2, 3)
        for _ in range(exchanges):
            example = next(generator)
            turns += [Turn("user", example.say), Turn("assistant", example.answer)]
        yield turns
