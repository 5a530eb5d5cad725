"""What the trainer has to know of one of the demo models: its examples, how an answer is read, its sizes.

A task is a source of examples, a layout and a scorer; tokenizer, network, training loop, export and evaluation are the
same for all. Knows neither PyTorch nor llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODELS = HERE.parent / "models"

Case = tuple[str, Any]  # what is said, and what the answer has to read as


@dataclass(frozen=True)
class Sample:
    """What is said to the model, the answer it is to give, and what is compared of that (see `Task.read`)."""

    say: str
    answer: str
    want: Any


@dataclass(frozen=True)
class Task:
    """One demo model. `samples(seed, held_out)` is endless; the two sides share neither wordings nor names."""

    name: str  # also the file's: models/demo-NAME.gguf
    description: str
    samples: Callable[[int, bool], Iterator[Sample]]
    read: Callable[[str], Any]  # an answer as it is compared; None for one that cannot be read
    copied: Callable[[str], Sequence[str]]  # the parts of an answer whose words are copied from the sentence
    systems: tuple[str, ...]  # system messages that it sees in training, now and then
    held_out_seed: int
    held_out_count: int = 1000
    fixed: tuple[str, ...] = ()  # texts that are one token each
    vocab: int = 1024  # tokens without the fixed and the spaced ones
    spaced: int = 512  # of them there are so many with a space before them
    sizes: Mapping[str, int] = field(default_factory=dict)  # of the network, where they are not `Shape`'s
    steps: int = 2500

    @property
    def title(self) -> str:
        return f"FlexServe demo {self.name}"

    @property
    def model(self) -> Path:
        return MODELS / f"demo-{self.name}.gguf"

    @property
    def result(self) -> Path:
        """Where the evaluation's figures are kept."""
        return HERE / f"evaluation-{self.name}.json"

    @property
    def handwritten(self) -> Path:
        """Sentences written by hand, one JSON object a line; not every task has them."""
        return HERE / ("handwritten.jsonl" if self.name == "assistant" else f"handwritten-{self.name}.jsonl")

    def held_out(self, count: int | None = None) -> list[Case]:
        """Cases of the side of the split that training never sees."""
        samples = self.samples(self.held_out_seed, True)
        return [(s.say, s.want) for _, s in zip(range(count or self.held_out_count), samples, strict=False)]
