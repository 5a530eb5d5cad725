"""`flexserve bench workflows` and `groups`: several models under one budget, and who keeps which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .bench_options import (
    DIRECTORY,
    JSON,
    PROMPT_TOKENS,
    QUANT,
    ROUNDS,
    SEED,
    THREADS,
    measure,
    names,
    require_plot,
)
from .common import Whole
from .display import table
from .sizes import Size

POLICIES = click.option(
    "--policies",
    callback=names,
    metavar="A,B",
    help="Measure only these, as lru_as_is,lru_fair,flexserve. [default: all]",
)
WARM = click.option(
    "--warm",
    type=Whole(0, 100),
    default=2,
    show_default=True,
    help="Passes before the first round, for FlexServe to learn.",
)
THINK = click.option(
    "--think",
    "think_s",
    type=click.FloatRange(0, 86400),
    default=150.0,
    show_default=True,
    help="Mean pause that the timer sees; nobody waits for it.",
)
PLOT = click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw bars into this .png, .svg or .pdf file (needs matplotlib).",
)


@click.command("workflows")
@click.option(
    "--workflows", callback=names, metavar="A,B", help="Run only these, as Fact-Checking. [default: all ten]"
)
@POLICIES
@ROUNDS
@WARM
@click.option(
    "--wrong",
    type=Whole(0, 100),
    default=3,
    show_default=True,
    help="Wrong guesses of prefetch to measure.",
)
@click.option(
    "--budget", "budget_bytes", type=Size(), default=0, help="For all models. [default: half of all weights]"
)
@QUANT
@THINK
@SEED
@THREADS
@PLOT
@DIRECTORY
@JSON
def workflows(*, policies: tuple[str, ...], plot: Path | None, as_json: bool, **given: Any) -> None:
    """Agent workflows over several models: from the request to the first token of the last step.

    FlexServe with and without prefetch against policies of whole models, each as_is (plain llama.cpp) and fair (our
    pipeline, files and conversations). All of it takes hours; one workflow with all policies, some minutes a round.
    """
    from ..bench.workflow_run import POLICIES as ALL
    from ..bench.workflows import WorkflowsOptions, run

    options = WorkflowsOptions(policies=policies or ALL, **given)
    require_plot(plot)
    result = measure(run, options, _workflows, as_json=as_json)
    if plot is not None:
        from ..bench.workflow_plot import draw

        means = {
            name: {p: one["latency_s"]["median"] for p, one in row.items()}
            for name, row in result["workflows"].items()
        }
        draw(means, "seconds to the last step's first token", plot)


@click.command("groups")
@click.option(
    "--groups",
    callback=names,
    metavar="A,B",
    help="Model classes joined by +. [default: s+l,xs+s,xs+l,s+m,xs+s+l]",
)
@POLICIES
@ROUNDS
@click.option("--requests", type=Whole(1, 10000), default=8, show_default=True, help="Requests a round.")
@PROMPT_TOKENS
@click.option(
    "--output-tokens", type=Whole(1, 65536), default=32, show_default=True, help="Length of answers."
)
@WARM
@click.option(
    "--budget",
    "budget_bytes",
    type=Size(),
    default=0,
    help="For all models. [default: half of a group's weights]",
)
@QUANT
@THINK
@SEED
@THREADS
@PLOT
@DIRECTORY
@JSON
def groups(
    *, groups: tuple[str, ...], policies: tuple[str, ...], plot: Path | None, as_json: bool, **given: Any
) -> None:
    """Several models that are asked in turns, at random: time to the first token.

    The same policies as in `bench workflows`.
    """
    from ..bench.groups import USUAL_GROUPS, GroupsOptions, run
    from ..bench.workflow_run import POLICIES as ALL

    options = GroupsOptions(groups=groups or USUAL_GROUPS, policies=policies or ALL, **given)
    require_plot(plot)
    result = measure(run, options, _groups, as_json=as_json)
    if plot is not None:
        from ..bench.workflow_plot import draw

        means = {
            name: {p: row["mean_ttft_s"] for p, row in one["results"].items()}
            for name, one in result["groups"].items()
        }
        draw(means, "mean time to the first token, s", plot)


def _workflows(result: dict[str, Any]) -> str:
    medians = {
        name: {policy: one["latency_s"]["median"] for policy, one in row.items()}
        for name, row in result["workflows"].items()
    }
    parts = [_seconds("WORKFLOW", medians), _ratios(result["ratios"], result["ratios_by_workflow"])]
    if (saved := result["prefetch"]) is not None and saved["saving"] is not None:
        parts.append(
            f"prefetch saves {100 * saved['saving']:.0f} % of the time to a step's first token where the decode before "
            f"is as long as the load ({len(saved['steps'])} steps; promise: >= 25 %)"
        )
    if (wrong := result["wrong_prefetch"]) is not None:
        parts.append(f"a wrong guess costs another request {100 * wrong['cost']:.1f} % (promise: <= 3 %)")
    return "\n\n".join(parts)


def _groups(result: dict[str, Any]) -> str:
    means = {
        name: {policy: row["mean_ttft_s"] for policy, row in one["results"].items()}
        for name, one in result["groups"].items()
    }
    return _seconds("GROUP", means) + "\n\n" + _ratios(result["ratios"], result["ratios_by_group"])


def _seconds(first: str, values: dict[str, dict[str, float]]) -> str:
    """A row for each policy: there are more of them than of anything else."""
    policies = list(dict.fromkeys(policy for row in values.values() for policy in row))
    cells = [
        (policy, *(f"{row[policy]:.2f}" if policy in row else "-" for row in values.values()))
        for policy in policies
    ]
    return table((f"SECONDS BY {first}", *values), cells, right=frozenset(values))


def _ratios(means: dict[str, float | None], each: dict[str, dict[str, float]]) -> str:
    from ..bench.workflow_report import PROMISES

    cells = [
        (
            f"flexserve / {policy}",
            f"{mean:.2f}",
            f"{min(each[policy].values()):.2f} to {max(each[policy].values()):.2f}",
            f"<= {PROMISES[policy]:.2f}" if policy in PROMISES else "-",
        )
        for policy, mean in means.items()
        if mean is not None
    ]
    numbers = ("MEAN", "FROM TO", "PROMISE")
    return table(("RATIO", *numbers), cells, right=frozenset(numbers))


COMMANDS = (workflows, groups)
