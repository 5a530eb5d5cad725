"""The demo rewriter as a task: a rambling note becomes one short polite message.

What a note says is one of some dozen things (the sections of text/rewriter/notes.txt); the chatter around it is to be
left out. One form per thing, so that "exactly right" can be counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from .forms import fill, wordings
from .task import Sample, Task
from .text import items
from .words import Words

# What is written for each section; {say} of the note stands there again.
POLITE: dict[str, str] = {
    "late {n}": "I will be {n} minutes late for {event}. I am sorry for the delay.",
    "cancel": "I am sorry, but I cannot come to {event} {day}.",
    "send": "Could you please send me {thing} {day}?",
    "where": "Could you please tell me where {thing} is?",
    "thanks": "Thank you very much for {thing}.",
    "broken": "Could you please have a look at {thing}? It does not work.",
    "invite": "I would like to invite you to {event} {day}.",
    "move": "Could we please move {event} to {when}?",
    "ready": "You can have {thing} now. It is ready.",
    "borrow": "May I please borrow {thing}?",
    "confirm": "Could you please confirm {event} {day}?",
    "call": "Could you please call me back {day}?",
    "forgot": "I am sorry that I missed {event}.",
}
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_LISTS = items("rewriter")
_SYSTEM = (
    "You are a helpful assistant.",
    "Rewrite the note as a short polite message.",
    "You rewrite messages. Be brief and polite.",
    "Polish what the user writes.",
    "You are FlexServe's demo rewriter.",
)


@dataclass
class _Note:
    rng: Random
    words: Words
    said: dict[str, str] = field(default_factory=dict)

    def slot(self, name: str) -> str:
        """What is said there; kept for the polite form."""
        rng = self.rng
        if name == "n":
            value = str(rng.choice([5, 10, 15, 20, 30, 45, rng.randint(2, 59)]))
        elif name == "event":
            value = self.words.event(rng)
        elif name == "thing":
            value = self.words.thing(rng)
        elif name == "when":
            value = rng.choice(["tomorrow", "next week", *_WEEKDAYS, f"next {rng.choice(_WEEKDAYS)}"])
        else:
            weekday = rng.choice(_WEEKDAYS)
            days = ["tomorrow", "today", "tonight", "next week", "this week", "this weekend"]
            value = rng.choice([*days, f"on {weekday}", f"on {weekday}", f"next {weekday}"])
        self.said[name] = value
        return value


def _ramble(rng: Random, template: str) -> str:
    """Fillers between the words of a template, none inside an alternative or next to a slot's beginning."""
    words = template.split()
    for at in range(len(words) - 1, 0, -1):
        if rng.random() < 0.12:
            words.insert(at, rng.choice(_LISTS["fillers"]) + rng.choice(["", "", ","]))
    return " ".join(words)


class Notes:
    """An endless, seeded source of notes and their polite forms from one side of the split."""

    def __init__(self, seed: int, held_out: bool) -> None:
        self.rng = Random(f"rewriter/{seed}/{'held-out' if held_out else 'training'}")
        self.held_out, self.words = held_out, Words(held_out)

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        rng, note = self.rng, _Note(self.rng, self.words)
        section = rng.choice([one for one in POLITE if wordings("rewriter", one, self.held_out)])
        template = rng.choice(rng.choice(wordings("rewriter", section, self.held_out)))
        say = fill(_ramble(rng, template), note.slot)
        greeting = "Hello,"
        if rng.random() < 0.55:
            name = self.words.name(rng)
            greeting = f"Hi {name},"
            lead = rng.choice(
                ["hey {}", "hi {}", "tell {}", "write to {}", "{}", "to {}", "note for {}", "for {}"]
            )
            say = lead.format(name) + rng.choice([", ", ", ", ": ", " "]) + say
        if rng.random() < 0.5:
            say = f"{rng.choice(_LISTS['beginnings'])}{rng.choice([' ', ', '])}{say}"
        chatter = rng.random()
        if chatter < 0.3:
            say = f"{rng.choice(_LISTS['chatter'])}{rng.choice([', ', '. ', ' and '])}{say}"
        elif chatter < 0.6:
            say = f"{say}{rng.choice([', ', '. ', ' and ', ' because '])}{rng.choice(_LISTS['chatter'])}"
        if rng.random() < 0.3:
            say = f"{say}{rng.choice([' ', ', '])}{rng.choice(_LISTS['ends'])}"
        body = fill(POLITE[section], note.said.__getitem__)
        answer = f"{greeting} {body[0].lower() if not body.startswith('I ') else 'I'}{body[1:]}"
        return Sample(say, answer, answer)


def samples(seed: int, held_out: bool) -> Iterator[Sample]:
    return Notes(seed, held_out)


TASK = Task(
    name="rewriter",
    description="Turns a rambling note into one short polite message. Trained from scratch on generated text.",
    samples=samples,
    read=str.strip,
    copied=lambda answer: [answer],
    systems=_SYSTEM,
    held_out_seed=72_000,
    held_out_count=500,
    sizes={"width": 192, "layers": 4, "heads": 6, "kv_heads": 3, "ff": 512},
    steps=700,
)
