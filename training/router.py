"""The demo router as a task: which of the demo models a sentence is for, as one word."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from . import guard, rewriter
from .assistant import avoided
from .forms import choose, fill, normalise, templates, trained
from .generator import Generator
from .task import Sample, Task

AGENTS = ("assistant", "rewriter", "guard", "none")
_SYSTEM = (
    "You are a helpful assistant.",
    "Say which agent the sentence is for: assistant, rewriter, guard or none.",
    "You route requests. Answer with one word.",
    "You are FlexServe's demo router.",
)


class Requests:
    """An endless, seeded source of sentences and the agent they are for, from one side of the split."""

    def __init__(self, seed: int, held_out: bool) -> None:
        self.rng = Random(f"router/{seed}/{'held-out' if held_out else 'training'}")
        self.held_out = held_out
        self._commands = Generator(seed, held_out, avoid=avoided())
        self._material = {"note": rewriter.samples(seed, held_out), "private": guard.samples(seed, held_out)}

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        agent = self.rng.choice(AGENTS)
        say = self._request(agent) if agent in {"rewriter", "guard"} else self._command(agent)
        return Sample(say, agent, agent)

    def _command(self, agent: str) -> str:
        return next(e.say for e in self._commands if (e.call["tool"] == "none") == (agent == "none"))

    def _request(self, agent: str) -> str:
        rng = self.rng
        while True:
            template = choose(rng, rng.choice(templates("router", agent, self.held_out)))
            if not (self.held_out and normalise(template) in trained("router", agent)):
                break
        if rng.random() < 0.25:
            template = f"{rng.choice(['please', 'hey,', 'ok,', 'hi,', 'so,'])} {template}"
        if rng.random() < 0.5:
            template = template[0].upper() + template[1:]
        return fill(template, lambda slot: next(self._material[slot]).say)


def samples(seed: int, held_out: bool) -> Iterator[Sample]:
    return Requests(seed, held_out)


TASK = Task(
    name="router",
    description="Says which of the demo models a sentence is for, in one word. Trained from scratch on generated text.",
    samples=samples,
    read=str.strip,
    copied=lambda answer: [],
    systems=_SYSTEM,
    held_out_seed=74_000,
    held_out_count=500,
    spaced=384,
    sizes={"width": 160, "layers": 3, "heads": 5, "kv_heads": 5, "ff": 320},
    steps=300,
)
