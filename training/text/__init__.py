"""The generator's word lists and sentence templates, as text files of `[section]`s."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def sections(name: str) -> dict[str, tuple[str, ...]]:
    """The lines of `name`.txt per section, without comments and empty lines."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in (Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8").splitlines():
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
