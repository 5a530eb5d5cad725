"""Templates: which of them are held out, how their alternatives are chosen and their slots filled."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import cache
from random import Random

from .text import sections
from .words import SPLIT, is_held_out

HELD_OUT_SHARE = 0.12

_CHOICE = re.compile(r"\(([^()]*)\)")
_SLOT = re.compile(r"\{(\w+)\}")


@cache
def templates(folder: str, section: str, held_out: bool) -> tuple[str, ...]:
    """The lines of one section on one side of the split; a line written twice is drawn twice as often."""
    lines = sections(folder)[section]
    by_digest = sorted(set(lines), key=lambda line: hashlib.sha256(f"{SPLIT}/{line}".encode()).digest())
    chosen = set(by_digest[: max(1, round(HELD_OUT_SHARE * len(by_digest)))])
    return tuple(line for line in lines if (line in chosen) == held_out)


def choose(rng: Random, template: str) -> str:
    """The template with its alternatives chosen, from the inside out; slots still open."""
    while _CHOICE.search(template):
        template = _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), template)
    return template


def spellings(template: str) -> list[str]:
    """The template with its alternatives chosen in every possible way, slots still open."""
    found = _CHOICE.search(template)
    if found is None:
        return [template]
    before, after = template[: found.start()], template[found.end() :]
    return [full for choice in found[1].split("|") for full in spellings(before + choice + after)]


@cache
def wordings(folder: str, section: str, held_out: bool) -> tuple[tuple[str, ...], ...]:
    """Of every line, its wordings on one side of a split by wordings: for tasks with too few lines to hold out whole
    ones. Lines that have none on that side are left out."""
    found = (
        tuple(say for say in spellings(line) if is_held_out(normalise(say)) == held_out)
        for line in sections(folder)[section]
    )
    return tuple(line for line in found if line)


def fill(template: str, slot: Callable[[str], str]) -> str:
    """The template with every `{name}` replaced by slot("name"), from left to right."""
    return _SLOT.sub(lambda found: slot(found[1]), template)


def normalise(say: str) -> str:
    """A sentence without case and punctuation, to compare it with others."""
    return " ".join(re.sub(r"[^\w\s:']", " ", say.lower()).split())


@cache
def trained(folder: str, section: str) -> frozenset[str]:
    """What the training side's templates of a section can say."""
    lines = templates(folder, section, False)
    return frozenset(normalise(say) for line in lines for say in spellings(line))
