"""The generator's word lists and sentence templates, as text files of `[section]`s.

A line in `templates/` is one template, and the unit of the held-out split. `(a|b|)` picks one of the alternatives,
`{slot}` is filled by the generator. A line that begins with "=" is a whole sentence; the others are imperatives,
which may get "could you ..." in front. A line written twice is drawn twice as often. Items in `words/` end at "|" or
at the end of a line.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def sections(name: str) -> dict[str, tuple[str, ...]]:
    """The lines of the files in `name`/ per section, without comments and empty lines."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for path in sorted((Path(__file__).parent / name).glob("*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("["):
                lines = found.setdefault(line.strip("[]"), [])
            elif line.strip() and not line.startswith("#"):
                lines.append(line)
    return {section: tuple(lines) for section, lines in found.items()}


@cache
def items(name: str) -> dict[str, tuple[str, ...]]:
    """The same with every line cut at "|"."""
    return {
        section: tuple(item for line in lines for item in line.split("|"))
        for section, lines in sections(name).items()
    }
