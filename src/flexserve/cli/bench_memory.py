"""`flexserve bench memory`, `soak`, `neighbours`, `ablation`: what memory costs, and what it brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .bench_options import DIRECTORY, JSON, default_directory, names
from .common import human_bytes, print_json, progress_bar
from .display import note, table

SHAPE = click.option(
    "--shape", default="llama-3.2-1b", show_default=True, help="The model shape (random weights)."
)
QUANT = click.option("--quant", default="Q8_0", show_default=True, help="F16, Q8_0, Q4_0, Q4_K_M or IQ4_NL.")
THREADS = click.option("--threads", type=click.IntRange(1, 256), help="Compute threads. [default: all cores]")
ROUNDS = click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Rounds.")


@click.command("memory")
@SHAPE
@QUANT
@click.option(
    "--prompt-tokens", type=click.IntRange(1, 65536), default=128, show_default=True, help="Prompt length."
)
@click.option(
    "--session-tokens",
    type=click.IntRange(64, 16384),
    default=1024,
    show_default=True,
    help="Length of the conversation that is saved and restored.",
)
@ROUNDS
@click.option(
    "--parts", callback=names, metavar="A,B", help="Measure only these. [default: all but pressure]"
)
@THREADS
@DIRECTORY
@JSON
def memory(
    *,
    shape: str,
    quant: str,
    prompt_tokens: int,
    session_tokens: int,
    rounds: int,
    parts: tuple[str, ...],
    threads: int | None,
    directory: Path | None,
    as_json: bool,
) -> None:
    """What it costs to give memory back and to get it again.

    The parts are recall, refill, lazy, cached, session and pressure (docs/benchmarks.md). `pressure` holds nearly all
    memory of the machine for a minute or two: do not run it beside anything that must not be killed.
    """
    from ..bench.memory_bench import USUAL_PARTS, MemoryOptions, run

    options = MemoryOptions(
        shape=shape,
        quant=quant,
        prompt_tokens=prompt_tokens,
        session_tokens=session_tokens,
        rounds=rounds,
        parts=parts or USUAL_PARTS,
        directory=directory or default_directory(),
        threads=threads or 0,
    )
    with progress_bar("model") as progress:
        result = run(options, note, progress)
    if as_json:
        print_json(result)
        return
    for part, show in (("recall", _recalls), ("cached", _cached), ("pressure", _pressure)):
        if result[part]:
            click.echo(f"\n{show(result[part])}")
    rows = [(key, _value(result[key]), promise) for key, promise in PROMISES.items()]
    click.echo("\n" + table(("NUMBER", "SEEN", "PROMISE"), rows, right=frozenset({"SEEN", "PROMISE"})))


PROMISES = {
    "recall_gbps": ">= 10",
    "recall_first_byte_ms": "<= 1",
    "async_return_ms_128mib": "<= 3",
    "refill_gbps_per_core": ">= 2.5",
    "lazy_gbps": ">= 20",
    "ttft_half_cached_vs_resident": "<= 1.20",
    "ttft_three_quarters_cached_vs_resident": "<= 1.12",
    "session_restore_vs_recompute": "<= 0.02",
}


def _value(number: float | None) -> str:
    return "-" if number is None else f"{number:.4g}"


def _median(spread: dict[str, Any] | None, form: str = ".1f") -> str:
    return "-" if spread is None else format(spread["median"], form)


def _recalls(rows: list[dict[str, Any]]) -> str:
    cells = [
        (
            row["asked"],
            row["during"],
            human_bytes(row["freed_bytes"]),
            _median(row["sync_ms"]),
            _median(row["two_stage_ms"]),
            _median(row["async_ms"], ".2f"),
            _median(row["first_byte_ms"], ".2f"),
            _median(row["gbps"]),
            _median(row["usual_gap_ms"]),
            _median(row["longest_gap_ms"]),
        )
        for row in rows
    ]
    numbers = ("FREED", "SYNC ms", "TWO-STAGE ms", "ASYNC ms", "FIRST ms", "GB/s", "GAP ms", "LONGEST ms")
    return table(("RECALL", "DURING", *numbers), cells, right=frozenset(numbers))


def _cached(rows: list[dict[str, Any]]) -> str:
    cells = [
        (
            row["source"],
            f"{100 * row['fraction']:.0f} %",
            human_bytes(row["resident_bytes"]),
            _median(row["ttft_s"], ".3f"),
            f"{row['vs_resident']:.2f}",
        )
        for row in rows
    ]
    numbers = ("RESIDENT", "BYTES", "TTFT s", "OF RESIDENT")
    return table(("REST FROM", *numbers), cells, right=frozenset(numbers))


def _pressure(part: dict[str, Any]) -> str:
    cells = [
        (
            one["side"],
            human_bytes(one["left_bytes"]),
            "-" if one["resident_bytes"] is None else human_bytes(one["resident_bytes"]),
            f"{one['ttft_s']:.3f}",
        )
        for one in part["starts"]
    ]
    numbers = ("LEFT", "RESIDENT", "TTFT s")
    lazy = part["lazy"]
    took = (
        f"of {human_bytes(lazy['handed_bytes'])} lazy weights the kernel took {human_bytes(lazy['taken_bytes'])}; "
        f"the answer afterwards was {'the same' if lazy['same_answer'] else 'ANOTHER ONE'}"
    )
    return table(("SIDE", *numbers), cells, right=frozenset(numbers)) + "\n" + took


COMMANDS = (memory,)
