"""The demo privacy guard as a task: a text comes back letter by letter, with placeholders for what is private.

Private are names of people, phone numbers, e-mail addresses, postal addresses, and numbers of cards and accounts.
Towns, days, times, amounts and things are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from .forms import fill, wordings
from .phrases import WEEKDAYS
from .task import Sample, Task
from .words import Words

PLACEHOLDERS = {
    "name": "[NAME]",
    "surname": "[NAME]",
    "phone": "[PHONE]",
    "email": "[EMAIL]",
    "address": "[ADDRESS]",
    "number": "[NUMBER]",
}
_STREETS = ("Street", "Road", "Avenue", "Lane", "Drive", "Square", "Way", "Close", "Court", "Street", "Road")
_DOMAINS = ("com", "org", "net", "de", "co.uk", "eu", "io", "fr")
_SYSTEM = (
    "You are a helpful assistant.",
    "Replace everything private with placeholders.",
    "Redact the text.",
    "You are a privacy guard. Repeat the text without personal data.",
    "You are FlexServe's demo guard.",
)


def _digits(rng: Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


class Texts:
    """An endless, seeded source of texts and what the guard makes of them, from one side of the split."""

    def __init__(self, seed: int, held_out: bool) -> None:
        self.rng = Random(f"guard/{seed}/{'held-out' if held_out else 'training'}")
        self.held_out, self.words = held_out, Words(held_out)

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        rng = self.rng
        pairs = [self._sentence() for _ in range(rng.choice([1, 1, 2, 2, 3]))]
        say, answer = (" ".join(part) for part in zip(*pairs, strict=True))
        if rng.random() < 0.12:
            say, answer = say.lower(), answer.lower()
            for placeholder in PLACEHOLDERS.values():
                answer = answer.replace(placeholder.lower(), placeholder)
        return Sample(say, answer, answer)

    def _sentence(self) -> tuple[str, str]:
        rng = self.rng
        section = "private" if rng.random() < 0.75 else "plain"
        template = rng.choice(rng.choice(wordings("guard", section, self.held_out)))
        said: list[str] = []

        def say(slot: str) -> str:
            said.append(self._slot(slot))
            return said[-1]

        full = fill(template, say)
        rest = iter(said)

        def hide(slot: str) -> str:
            value = next(rest)
            return PLACEHOLDERS.get(slot, value)

        hidden = fill(template, hide)
        if template[0] == "{":  # a sentence may begin with something that is not a name
            full, hidden = _capital(full), _capital(hidden)
        return full, hidden

    def _slot(self, slot: str) -> str:
        rng, words = self.rng, self.words
        if slot == "name":
            style = rng.random()
            if style < 0.45:
                return words.name(rng)
            if style < 0.85:
                return f"{words.name(rng)} {words.surname(rng)}"
            return f"{rng.choice(['Mr', 'Ms', 'Mrs', 'Dr', 'Mr.', 'Dr.'])} {words.surname(rng)}"
        if slot == "phone":
            lead = rng.choice(["0", "+44 ", "+49 ", "+1 ", "0", "(0"])
            area = _digits(rng, rng.randint(2, 4)) + (")" if lead == "(0" else "")
            joint = rng.choice([" ", "-", " ", ""])
            return lead + area + joint + joint.join(_digits(rng, rng.randint(3, 4)) for _ in range(2))
        if slot == "email":
            name, domain = (
                words.name(rng).lower(),
                rng.choice([words.surname(rng), words.invented(rng)]).lower(),
            )
            name += rng.choice(["", f".{words.surname(rng).lower()}", _digits(rng, 2), f"_{_digits(rng, 1)}"])
            return f"{name}@{domain}.{rng.choice(_DOMAINS)}"
        if slot == "address":
            street = f"{rng.randint(1, 199)} {words.surname(rng)} {rng.choice(_STREETS)}"
            return street + (f", {_digits(rng, 5)} {words.city(rng)}" if rng.random() < 0.35 else "")
        if slot == "number":
            if rng.random() < 0.4:
                return " ".join(_digits(rng, 4) for _ in range(4))
            return rng.choice(["", "", "DE", "AB", "GB", "X"]) + _digits(rng, rng.randint(6, 12))
        if slot == "time":
            return f"{rng.randint(1, 23)}:{rng.randrange(0, 60, 5):02d}"
        makers = {
            "surname": lambda: words.surname(rng),
            # From the lists, which name nobody.
            "event": lambda: rng.choice(words.events),
            "thing": lambda: rng.choice(words.things) if rng.random() < 0.8 else f"the {words.phrase(rng)}",
            "city": lambda: rng.choice(words.cities),
            "day": lambda: rng.choice(WEEKDAYS),
            "n": lambda: str(rng.randint(2, 120)),
            "clause": lambda: rng.choice(words.clauses),
        }
        return makers[slot]()


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def samples(seed: int, held_out: bool) -> Iterator[Sample]:
    return Texts(seed, held_out)


TASK = Task(
    name="guard",
    description="Repeats a text with placeholders for names, phone numbers, e-mail addresses, postal addresses and "
    "account numbers. Trained from scratch on generated text.",
    samples=samples,
    read=str.strip,
    copied=lambda answer: [answer],
    systems=_SYSTEM,
    held_out_seed=73_000,
    held_out_count=500,
    fixed=tuple(sorted(set(PLACEHOLDERS.values()))),
    sizes={"width": 192, "layers": 4, "heads": 6, "kv_heads": 3, "ff": 512},
    steps=800,
)
