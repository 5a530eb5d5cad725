"""`flexserve bench memory`, `soak`, `equality`, `neighbours`, `ablation`: what memory costs, and what it brings."""

from __future__ import annotations

from typing import Any

import click

from .bench_options import (
    DIRECTORY,
    JSON,
    PROMPT_TOKENS,
    QUANT,
    ROUNDS,
    SEED,
    SHAPE,
    THREADS,
    measure,
    names,
)
from .common import Whole, human_bytes
from .display import table
from .sizes import Size


@click.command("memory")
@SHAPE
@QUANT
@PROMPT_TOKENS
@click.option(
    "--session-tokens",
    type=Whole(64, 16384),
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
def memory(*, parts: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """What it costs to give memory back and to get it again.

    The parts are decision, recall, refill, lazy, cached, session and pressure (docs/benchmarks.md). `pressure` holds
    nearly all memory of the machine for a minute or two: do not run it beside anything that must not be killed.
    """
    from ..bench.memory_bench import USUAL_PARTS, MemoryOptions, run

    measure(run, MemoryOptions(parts=parts or USUAL_PARTS, **given), _memory, as_json=as_json)


PROMISES = {
    "decision_ms": "<= 1",
    "recall_gbps": ">= 10",
    "recall_first_byte_ms": "<= 1",
    "async_return_ms_128mib": "<= 3",
    "refill_gbps_per_core": ">= 2.5",
    "lazy_gbps": ">= 20",
    "ttft_half_cached_vs_resident": "<= 1.20",
    "ttft_three_quarters_cached_vs_resident": "<= 1.12",
    "session_restore_vs_recompute": "<= 0.02",
}


def _memory(result: dict[str, Any]) -> str:
    parts = [
        f"\n{show(result[part])}\n"
        for part, show in (("recall", _recalls), ("cached", _cached), ("pressure", _pressure))
        if result[part]
    ]
    rows = [(key, _value(result[key]), promise) for key, promise in PROMISES.items()]
    return (
        "".join(parts)
        + "\n"
        + table(("NUMBER", "SEEN", "PROMISE"), rows, right=frozenset({"SEEN", "PROMISE"}))
    )


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


@click.command("soak")
@click.option(
    "--minutes",
    type=click.FloatRange(0, 10080, min_open=True),
    default=30.0,
    show_default=True,
    help="How long.",
)
@SHAPE
@QUANT
@SEED
@click.option(
    "--threads",
    type=Whole(1, 256),
    default=1,
    show_default=True,
    help="Compute threads of each world.",
)
@DIRECTORY
@JSON
@click.pass_context
def soak(context: click.Context, /, *, as_json: bool, **given: Any) -> None:
    """Requests under a storm of recalls, offers, budgets and cancels; ends with 1 when an invariant is broken.

    Every answer is compared, token by token, with that of a second world which is left alone; so it takes the memory
    of two models.
    """
    from ..bench.soak import SoakOptions, run

    if measure(run, SoakOptions(**given), _soak, as_json=as_json)["violations"]:
        context.exit(1)


def _soak(result: dict[str, Any]) -> str:
    errors = ", ".join(f"{count} {code}" for code, count in result["errors"].items()) or "none"
    lines = [
        f"{result['minutes']:.1f} minutes, seed {result['seed']}",
        f"requests    {result['requests']}, of which {result['cancelled_answers']} cancelled; errors: {errors}",
        f"compared    {result['compared_tokens']} tokens of {result['compared_answers']} answers; "
        f"{result['recomputed_answers']} answers were computed in other batches",
        f"recalls     {result['recalls']}, {human_bytes(result['recalled_bytes'])}",
        f"budget      {result['offers']} offers, {result['budget_changes']} changes",
        f"memory      {human_bytes(result['begin_bytes'])} at the begin, {human_bytes(result['end_bytes'])} at the end",
        f"violations  {result['violations']}",
        *(f"  {text}" for text in result["violation_list"]),
    ]
    return "\n".join(lines)


@click.command("neighbours")
@SHAPE
@QUANT
@click.option(
    "--data", "data_bytes", type=Size(), default="1G", show_default=True, help="Each application's data."
)
@click.option(
    "--model-share",
    type=click.FloatRange(0, 4),
    default=0.25,
    show_default=True,
    help="Share of the weights that fits beside the data.",
)
@click.option(
    "--every", "every_s", type=float, default=10.0, show_default=True, help="Seconds between requests."
)
@click.option(
    "--timer",
    "timer_s",
    type=float,
    default=5.0,
    show_default=True,
    help="Seconds until the timer's side gives back.",
)
@click.option(
    "--seconds", "measure_s", type=float, default=60.0, show_default=True, help="Of measuring, for each side."
)
@click.option(
    "--warm",
    "warm_s",
    type=float,
    default=20.0,
    show_default=True,
    help="Seconds before, for the applications.",
)
@click.option("--sides", callback=names, metavar="A,B", help="Measure only these. [default: all]")
@THREADS
@DIRECTORY
@JSON
def neighbours(*, sides: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Applications that need memory (SQLite, a reader) beside a model: their throughput, and time to the first token.

    Against a model that is always kept, never kept, and dropped by a timer. Another process holds what memory the
    machine has beyond that: do not run it beside anything that must not be killed.
    """
    from ..bench.neighbours import SIDES, NeighboursOptions, run

    measure(run, NeighboursOptions(sides=sides or SIDES, **given), _neighbours, as_json=as_json)


def _neighbours(result: dict[str, Any]) -> str:
    cells = [
        (
            name,
            f"{side['sqlite_queries_per_s']:.0f}",
            _percent(side["sqlite_vs_none"]),
            f"{side['reader_bytes_per_s'] / 1e6:.0f}",
            _percent(side["reader_vs_none"]),
            _median(side["ttft_s"], ".2f"),
            "-" if side["resident_bytes"] is None else human_bytes(side["resident_bytes"]),
        )
        for name, side in result["sides"].items()
    ]
    numbers = ("SQLITE/s", "OF NONE", "READ MB/s", "OF NONE ", "TTFT s", "RESIDENT")
    return "\n" + table(("SIDE", *numbers), cells, right=frozenset(numbers))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


@click.command("ablation")
@SHAPE
@click.option(
    "--quant",
    default="Q4_0",
    show_default=True,
    help="F16, Q8_0, Q4_0, Q4_K_M or IQ4_NL; `layout` needs a repacked one.",
)
@PROMPT_TOKENS
@click.option(
    "--prefix", type=float, default=0.5, show_default=True, help="Share of the weights that is resident."
)
@ROUNDS
@THREADS
@DIRECTORY
@JSON
def ablation(*, as_json: bool, **given: Any) -> None:
    """What pipeline, resident prefix and execution layout bring to a cold start, one on top of the other."""
    from ..bench.ablation import AblationOptions, run

    measure(run, AblationOptions(**given), _ablation, as_json=as_json)


def _ablation(result: dict[str, Any]) -> str:
    cells = [
        (
            name,
            _median(step["ttft_s"], ".3f"),
            f"{step['vs_step_before']:.2f}",
            f"{step['vs_sequential']:.2f}",
        )
        for name, step in result["steps"].items()
    ]
    numbers = ("TTFT s", "OF THE STEP BEFORE", "OF SEQUENTIAL")
    return "\n" + table(("STEP", *numbers), cells, right=frozenset(numbers))


@click.command("equality")
@SHAPE
@QUANT
@PROMPT_TOKENS
@click.option("--tokens", type=Whole(2, 65536), default=512, show_default=True, help="Length of the answer.")
@click.option(
    "--segments",
    type=Whole(2, 1 << 20),
    default=1024,
    show_default=True,
    help="How many segments are to be lost during it, at least.",
)
@SEED
@THREADS
@DIRECTORY
@JSON
@click.pass_context
def equality(context: click.Context, /, *, as_json: bool, **given: Any) -> None:
    """A long answer under a storm of recalls, compared with the undisturbed one; ends with 1 when they differ."""
    from ..bench.equality import EqualityOptions, run

    if not measure(run, EqualityOptions(**given), _equality, as_json=as_json)["equal"]:
        context.exit(1)


def _equality(result: dict[str, Any]) -> str:
    verdict = "equal" if result["equal"] else "DIFFERENT"
    return (
        f"{verdict}: {result['equal_tokens']} of {result['tokens']} tokens, seed {result['seed']}; {result['recalls']} "
        f"recalls took {result['lost_segments']} segments\n"
        f"{result['undisturbed_s']:.1f} s undisturbed, {result['disturbed_s']:.1f} s in the storm"
    )


COMMANDS = (memory, soak, equality, neighbours, ablation)
