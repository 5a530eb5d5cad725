"""`flexserve demo`: things to look at, with the models in the repository."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from .bench_options import JSON
from .common import Whole, human_bytes, print_json, sigterm_interrupts
from .display import milliseconds, note, printable, table
from .sizes import Size


@click.group("demo")
def command() -> None:
    """Show what FlexServe does, with the small models that its repository carries."""


@command.command("agents")
@click.option(
    "--models",
    type=click.Path(file_okay=False, path_type=Path),
    help="The directory with the demo-*.gguf files. [default: the repository's models]",
)
@click.option(
    "--rounds",
    type=Whole(2, 100),
    default=4,
    show_default=True,
    help="How often each workflow runs.",
)
@click.option(
    "--budget",
    "budget_bytes",
    type=Size(),
    default=0,
    help="For weights, keys and values. [default: 55 % of the weights]",
)
@click.option("--threads", type=Whole(1, 256), help="Compute threads. [default: all cores]")
@JSON
def agents(
    *, models: Path | None, rounds: int, budget_bytes: int, threads: int | None, as_json: bool
) -> None:
    """Ten agent workflows with four small models, under a budget that does not hold them all.

    Seals the models for a device that is thrown away afterwards, runs every workflow without prefetch and with it,
    and shows what was prefetched and what that saved. The router, the guard, the rewriter and the assistant stand for
    the model classes xs, s, m and l of the workflows (docs/demo-model.md).
    """
    from ..demo.agents import Options, default_models, run

    with sigterm_interrupts(), tempfile.TemporaryDirectory(prefix="flexserve-demo-") as directory:
        options = Options(models or default_models(), rounds, threads or 0, budget_bytes)
        result = run(options, Path(directory), note)
    if as_json:
        print_json(result)
        return
    click.echo(_answers(result))
    click.echo()
    click.echo(_table(result))


def _answers(result: dict[str, Any]) -> str:
    lines = []
    for one in result["workflows"]:
        lines.append(one["workflow"])
        for step in one["steps"]:
            answer = printable(step["answer"]).replace("\n", " ")
            lines.append(f"  {step['agent']:<9}  {step['say']}\n             -> {answer}")
    return "\n".join(lines)


def _table(result: dict[str, Any]) -> str:
    head = ("WORKFLOW", "STEPS", "FIRST RUN", "LATER", "WITHOUT PREFETCH", "SAVED", "PREFETCHED")
    rows = [
        (
            one["workflow"],
            " > ".join(step["agent"] for step in one["steps"]),
            milliseconds(one["first_latency_s"]),
            milliseconds(one["later_latency_s"]),
            milliseconds(one["later_latency_without_prefetch_s"]),
            f"{one['saved_s'] * 1000:.1f} ms",
            human_bytes(one["prefetched_bytes"]),
        )
        for one in result["workflows"]
    ]
    learned, size = (
        result["prefetch"],
        {key: human_bytes(result[key]) for key in ("weight_bytes", "budget_bytes")},
    )
    useful, useless = (human_bytes(learned[key]) for key in ("prefetched_bytes", "wasted_bytes"))
    notes = (
        "latency: from request to first token of the last step; later: the median of the third run and those after it",
        f"of {learned['predictions']} predictions {learned['hits']} came true: {useful} were prefetched for them, and "
        f"{useless} for others",
        f"the models weigh {size['weight_bytes']}; the budget is {size['budget_bytes']} for weights, keys and values",
    )
    return "\n".join((table(head, rows, right=frozenset(head[2:])), "", *notes))
