"""docs/cli.md and docs/errors.md are what the program says about itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexserve.cli.docs import cli_markdown, errors_markdown
from flexserve.errors import FlexServeError, by_code

DOCS = Path(__file__).parents[2] / "docs"
AGAIN = "run `python -m flexserve.cli.docs docs`"


def test_the_command_line_is_documented_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # the reader's terminal changes nothing
    assert (DOCS / "cli.md").read_text() == cli_markdown(), AGAIN


def test_the_errors_are_documented_as_they_are() -> None:
    assert (DOCS / "errors.md").read_text() == errors_markdown(), AGAIN


def all_errors(cls: type[FlexServeError] = FlexServeError) -> list[type[FlexServeError]]:
    found = [cls] if cls.__module__ == "flexserve.errors" else []
    for child in cls.__subclasses__():
        found += all_errors(child)
    return found


def test_every_error_has_a_code_of_its_own_and_a_meaning() -> None:
    classes = all_errors()
    assert len({cls.code for cls in classes}) == len(classes)
    for cls in classes:
        assert by_code(cls.code) is cls
        assert cls.__doc__
        assert cls is FlexServeError or f"| `{cls.code}` | {cls.http_status} | " in errors_markdown()
