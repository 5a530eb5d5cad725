"""`flexserve doctor`: what this machine and this installation protect, and against whom."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from typing import Any

import click

from .common import device_key_option, print_json

NOT_AS_PROMISED = 1
WORTH = {
    "single-user": "keeps weights, prompts and KV from other users, dumps and logs; not from root, nor from "
    "programs of this user",
    "service": "keeps weights, prompts and KV from every program of other users, and the keys from the gateway; not "
    "from root",
}
COLOURS = {"ok": "green", "weak": "yellow", "broken": "red", "unused": None}
INDENT = " " * 25
NARROWEST = 64


@click.command("doctor")
@device_key_option(required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object (docs/schemas/doctor.json).")
def command(*, device_key: str | None, as_json: bool) -> None:
    """Say what this machine and this installation protect, and against whom.

    Starts a secure process, tries to look into it as another program of this user would, and crashes it. Run
    it as the user who runs `flexserve serve`. Exit code 0: all that this version promises holds here
    (docs/threat-model.md); 1: a line is broken. Weak and unused lines are no broken promises.
    """
    import msgspec

    from ..worlds.linux.doctor import examine

    report = examine(device_key)
    if as_json:
        print_json(msgspec.to_builtins(report))
    else:
        width = min(shutil.get_terminal_size().columns, 110)
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        click.echo(report_text(msgspec.to_builtins(report), width), color=False if plain else None)
    if not report.holds:
        sys.exit(NOT_AS_PROMISED)


def report_text(report: dict[str, Any], width: int) -> str:
    """The object of docs/schemas/doctor.json as text; coloured, which click removes where it does not belong."""
    mode = report["mode"]
    parts = [
        click.style(f"FlexServe {report['version']}, {report['world']} world, {mode} mode", bold=True),
        _wrapped(f"{WORTH[mode]} (docs/threat-model.md)", width, ""),
        "",
    ]
    for line in report["lines"]:
        state = line["state"]
        head = f"{state:<8} {line['id']:<16}"
        first, *rest = _wrapped(line["found"], width, INDENT).splitlines()
        styled = click.style(
            f"{state:<8}", fg=COLOURS[state], bold=state == "broken" or None, dim=state == "unused" or None
        )
        parts.append(styled + f" {line['id']:<16}" + first[len(head) :])
        parts += rest
        if line["stops"]:
            verb = "stops" if state == "ok" else "would stop"
            parts.append(click.style(_wrapped(f"{verb}: {line['stops']}", width, INDENT), dim=True))
        if line["advice"]:
            parts.append(_wrapped(f"to do: {line['advice']}", width, INDENT))
    counts = {s: sum(line["state"] == s for line in report["lines"]) for s in COLOURS}
    verdict = (
        "all that this version promises holds here" if report["holds"] else "a promise does not hold here"
    )
    parts += [
        "",
        click.style(verdict, fg="green" if report["holds"] else "red", bold=True)
        + f": {', '.join(f'{count} {state}' for state, count in counts.items() if count)}",
    ]
    return "\n".join(parts)


def _wrapped(text: str, width: int, indent: str) -> str:
    return textwrap.fill(
        text, max(width, NARROWEST), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
