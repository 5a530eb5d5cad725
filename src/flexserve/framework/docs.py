"""Writes the diagrams and tables of docs/framework.md from the program: `python -m flexserve.framework.docs docs`.

The prose in that file is written by hand; what stands between `<!-- made: NAME -->` and `<!-- end -->` is replaced.
A test compares them, so that they cannot drift. Not a verb.
"""

from __future__ import annotations

import re
import sys
import typing
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path

from . import effects, events, tables
from .effects import MEANING
from .settings import GIB, MIB, Settings
from .tables import S, T

_MADE = re.compile(r"(<!-- made: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def refreshed(text: str) -> str:
    """The document with every made part made again. Raises `KeyError` for a part that nobody makes."""
    return _MADE.sub(lambda found: f"{found[1]}{PARTS[found[2]]()}{found[3]}", text)


def diagram(table: Mapping[tuple[S, T], S]) -> str:
    """A Mermaid state diagram; steps that stay where they are, are left out. GONE is the start and the end."""
    steps: dict[tuple[S, S], list[str]] = {}
    for (state, trigger), then in table.items():
        if state != then:
            steps.setdefault((state, then), []).append(trigger.name.lower())
    lines = [
        f"    {_node(state)} --> {_node(then)}: {', '.join(names)}" for (state, then), names in steps.items()
    ]
    return "```mermaid\nstateDiagram-v2\n" + "\n".join(lines) + "\n```\n"


def _node(state: Enum) -> str:
    return "[*]" if state.name == "GONE" else state.name


def stays(table: Mapping[tuple[S, T], S]) -> str:
    """The steps that a diagram leaves out."""
    kept: dict[str, list[str]] = {}
    for (state, trigger), then in table.items():
        if state == then:
            kept.setdefault(state.name, []).append(trigger.name.lower())
    said = "; ".join(f"{name}: {', '.join(triggers)}" for name, triggers in kept.items())
    return f"Reports that change nothing: {said}.\n" if said else ""


def machine(table: Mapping[tuple[S, T], S]) -> str:
    return diagram(table) + stays(table)


def settings_table() -> str:
    rows = "".join(
        f"| `{one.name}` | {_value(one.default)} | {one.metadata['unit']} | {one.metadata['text']} "
        f"| {one.metadata['source']} |\n"
        for one in fields(Settings)
    )
    return "| setting | default | unit | what it decides | source |\n|---|---|---|---|---|\n" + rows


def _value(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        for size, name in ((GIB, "GiB"), (MIB, "MiB")):
            if value and value % size == 0:
                return f"{value // size} {name}"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "on" if value is True else f"{value:g}" if isinstance(value, (int, float)) else str(value)


def reasons_table() -> str:
    rows = "".join(f"| `{why.value}` | {text} |\n" for why, text in MEANING.items())
    return "| why | means |\n|---|---|\n" + rows


def messages_table(union: object) -> str:
    """Each event or effect: its fields, and the first paragraph of its docstring."""
    rows = ""
    for cls in typing.get_args(union):
        names = ", ".join(f"`{one.name}`" for one in fields(cls))
        text = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
        text = "" if text.startswith(f"{cls.__name__}(") else text  # what dataclasses write by themselves
        rows += f"| `{cls.__name__}` | {names} | {text} |\n"
    return "| name | fields | means |\n|---|---|---|\n" + rows


PARTS = {
    "segment": lambda: machine(tables.SEGMENT),
    "session": lambda: machine(tables.SESSION),
    "request": lambda: machine(tables.REQUEST),
    "model": lambda: machine(tables.MODEL),
    "settings": settings_table,
    "events": lambda: messages_table(events.Event),
    "effects": lambda: messages_table(effects.Effect),
    "reasons": reasons_table,
}


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs") / "framework.md"
    path.write_text(refreshed(path.read_text()))


if __name__ == "__main__":
    main()
