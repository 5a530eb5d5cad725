"""What the benches' verbs share: where models are kept, `--json`, lists."""

from __future__ import annotations

import os
from pathlib import Path

import click


def default_directory() -> Path:
    """$XDG_CACHE_HOME/flexserve/bench, or below ~/.cache: models of gigabytes that can be made again."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "flexserve" / "bench"


DIRECTORY = click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where models are kept for the next run. [default: ~/.cache/flexserve/bench]",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


def names(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """A list with commas; empty when the option is not given."""
    return tuple(name.strip() for name in value.split(",")) if value is not None else ()
