"""Writes docs/cli.md and docs/errors.md from the program itself: `python -m flexserve.cli.docs [DIRECTORY]`.

A test compares them, so that neither can drift. Not a verb.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from .. import errors
from ..errors import FlexServeError
from .main import EXIT_INTERRUPTED, cli

WIDTH = 100
MADE = "<!-- Made by `python -m flexserve.cli.docs docs` from the program. Do not edit. -->\n"

CLI_HEAD = """# The command line

Answers and tables go to stdout, everything else (times, progress, warnings, errors) to stderr. An error is
`error: MESSAGE (CODE)` and mostly `hint: WHAT TO DO`; then stdout has no JSON object, with `--json` too. The
codes are in [errors.md](errors.md). Every `--json` prints one object (`trace`: one for each line) that
follows a JSON Schema in [schemas](schemas).

## Exit codes

| exit code | means |
|---|---|
"""

ERRORS_HEAD = """# Errors

One tree for the API, the command line and the log: the same `code` everywhere. The API answers with the HTTP status and
the body `{"error": {"code", "message", "hint", "type"}}` ([schemas/error.json](schemas/error.json)); a verb prints
`error: MESSAGE (CODE)` and the hint on stderr and ends with the exit code. No message repeats a prompt or an answer.
"""

TABLE_HEAD = """| code | HTTP | means | usual hint |
|---|---|---|---|
"""


def cli_markdown() -> str:
    """docs/cli.md."""
    codes: dict[int, list[str]] = {}
    for cls, depth in _tree(FlexServeError):
        if depth == 1 or cls is FlexServeError:
            codes.setdefault(cls.exit_code, []).append(_meaning(cls))
    rows = [(0, "Success."), *((code, " ".join(texts)) for code, texts in sorted(codes.items()))]
    rows.append((EXIT_INTERRUPTED, "Interrupted by Ctrl-C or SIGTERM (`serve` ends with 0 then)."))
    table = "".join(f"| {code} | {text} |\n" for code, text in rows)
    verbs = "".join(
        f"\n## {path}\n\n```\n{text}\n```\n"
        for path, text in _help(cli, click.Context(cli, info_name="flexserve"))
    )
    return MADE + CLI_HEAD + table + verbs


def errors_markdown() -> str:
    """docs/errors.md."""
    text = MADE + ERRORS_HEAD
    for cls, depth in _tree(FlexServeError):
        if depth <= 1:
            text += f"\n## Exit code {cls.exit_code}: {_meaning(cls)}\n\n{TABLE_HEAD}"
        text += f"| `{cls.code}` | {cls.http_status} | {_meaning(cls)} | {cls.default_hint} |\n"
    return text


def _tree(cls: type[FlexServeError], depth: int = 0) -> Iterator[tuple[type[FlexServeError], int]]:
    if cls.__module__ == errors.__name__:
        yield cls, depth
    for child in cls.__subclasses__():
        yield from _tree(child, depth + 1)


def _meaning(cls: type[FlexServeError]) -> str:
    return " ".join((cls.__doc__ or "").split())


def _help(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """(path, help) of a command and of everything below it."""
    context.terminal_width = context.max_content_width = WIDTH
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _help(child, click.Context(child, info_name=name, parent=context))


def write(directory: Path) -> None:
    """Write both files."""
    (directory / "cli.md").write_text(cli_markdown(), encoding="utf-8")
    (directory / "errors.md").write_text(errors_markdown(), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
