"""`flexserve bench`: measurements that show what the documentation promises."""

from __future__ import annotations

import os
from pathlib import Path

import click

from .common import human_bytes, print_json
from .display import note, table


def default_directory() -> Path:
    """$XDG_CACHE_HOME/flexserve/bench, or below ~/.cache: models of gigabytes that can be made again."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "flexserve" / "bench"


@click.group("bench")
def command() -> None:
    """Measure FlexServe against plain llama.cpp on this machine, both sides in one run."""


@command.command("cold-start")
@click.option("--shape", default="llama-3.2-1b", show_default=True, help="The model shape (random weights).")
@click.option("--quant", default="Q8_0", show_default=True, help="F16, Q8_0, Q4_0 or Q4_K_M.")
@click.option(
    "--prompt-tokens", type=click.IntRange(1, 65536), default=128, show_default=True, help="Prompt length."
)
@click.option(
    "--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Rounds per memory state."
)
@click.option(
    "--state",
    "states",
    type=click.Choice(["backed", "idle"]),
    multiple=True,
    help="The state of free memory before each start; by default both, one after the other.",
)
@click.option("--threads", type=click.IntRange(1, 256), help="Compute threads. [default: all cores]")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the models are kept for the next run. [default: ~/.cache/flexserve/bench]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def cold_start(
    *,
    shape: str,
    quant: str,
    prompt_tokens: int,
    rounds: int,
    states: tuple[str, ...],
    threads: int | None,
    directory: Path | None,
    as_json: bool,
) -> None:
    """Time to first token from cold: sealed against plain llama.cpp.

    Takes about three minutes a round at the default shape: every start is prepared alike.
    """
    from ..bench.cold_start import ColdStartOptions, run
    from ..bench.machine import MemoryState

    options = ColdStartOptions(
        shape=shape,
        quant=quant,
        prompt_tokens=prompt_tokens,
        rounds=rounds,
        states=tuple(MemoryState(s) for s in states) or tuple(MemoryState),
        directory=directory or default_directory(),
        threads=threads or 0,
    )
    result = run(options, note)
    if as_json:
        print_json(result)
        return
    for state, report in result["states"].items():
        click.echo(f"\n{state} memory, medians of {rounds} rounds")
        rows = [(side, f"{value:.3f}") for side, value in report["median_ttft_s"].items()]
        click.echo(table(("SIDE", "TTFT s"), rows, right=frozenset({"TTFT s"})))
        rows = [(name, f"{value:.2f}") for name, value in report["ratios"].items()]
        click.echo(table(("RATIO", "VALUE"), rows, right=frozenset({"VALUE"})))
    click.echo(
        f"\nregistering took {result['register_s']:.2f} s and left "
        f"{human_bytes(result['register_resident_bytes'])} of weights resident; "
        f"peak of the secure world {human_bytes(result['sealed_peak_bytes'])} "
        f"for {human_bytes(result['weight_bytes'])} of weights"
    )
