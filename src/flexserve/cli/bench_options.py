"""What the benches' verbs share: their options, and how a verb measures and prints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .common import Whole, print_json, progress_bar, sigterm_interrupts
from .display import note

Options = TypeVar("Options")
Say = Callable[[str], None]
Progress = Callable[[int, int], None] | None
Run = Callable[[Options, Say, Progress], dict[str, Any]]  # what a bench's module offers


def measure(
    run: Run[Options], options: Options, show: Callable[[dict[str, Any]], str], *, as_json: bool
) -> dict[str, Any]:
    """Run a bench, with what it does on stderr, and print one JSON object or what `show` makes of it."""
    with sigterm_interrupts(), progress_bar("model") as progress:
        result = run(options, note, progress)
    if as_json:
        print_json(result)
        return result
    click.echo(show(result))
    for name, reason in result.get("skipped", {}).items():
        note(f"{name} was not measured: {reason}")
    return result


def require_plot(plot: Path | None) -> None:
    """Before anything is measured in vain. Raises `Usage`."""
    if plot is not None:
        from ..bench.plot import require_matplotlib

        require_matplotlib()


def default_directory() -> Path:
    """$XDG_CACHE_HOME/flexserve/bench, or below ~/.cache: models of gigabytes that can be made again."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "flexserve" / "bench"


def names(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """A list with commas; empty when the option is not given."""
    return tuple(name.strip() for name in value.split(",")) if value is not None else ()


DIRECTORY = click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    callback=lambda _context, _parameter, value: value or default_directory(),
    help="Where models are kept for the next run. [default: ~/.cache/flexserve/bench]",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
SHAPE = click.option(
    "--shape", default="llama-3.2-1b", show_default=True, help="The model shape (random weights)."
)
QUANT = click.option("--quant", default="Q8_0", show_default=True, help="F16, Q8_0, Q4_0, Q4_K_M or IQ4_NL.")
THREADS = click.option(
    "--threads",
    type=Whole(1, 256),
    callback=lambda _context, _parameter, value: value or 0,
    help="Compute threads. [default: all cores]",
)
ROUNDS = click.option("--rounds", type=Whole(1, 100), default=3, show_default=True, help="Rounds.")
PROMPT_TOKENS = click.option(
    "--prompt-tokens", type=Whole(1, 65536), default=128, show_default=True, help="Prompt length."
)
SEED = click.option(
    "--seed", type=Whole(0, (1 << 32) - 1), help="Repeat a run's choices. [default: a new one]"
)
