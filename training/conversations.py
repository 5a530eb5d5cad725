"""Puts a task's samples into conversations: sometimes a system message, sometimes earlier turns."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from .task import Task
from .tokenizer import Turn
from .words import Words


def conversations(task: Task, seed: int) -> Iterator[list[Turn]]:
    """Endless conversations: 12 % begin with a system message, 8 % have more than one exchange."""
    rng, words, samples = Random(f"{seed}/conversations"), Words(held_out=False), task.samples(seed, False)
    while True:
        turns: list[Turn] = []
        if rng.random() < 0.12:
            text = rng.choice(task.systems) if rng.random() < 0.8 else words.salad(rng, 12)
            turns.append(Turn("system", text))
        exchanges = 1 if rng.random() < 0.92 else rng.randint(2, 3)
        for _ in range(exchanges):
            sample = next(samples)
            turns += [Turn("user", sample.say), Turn("assistant", sample.answer)]
        yield turns
