"""`flexserve bench groups`: several models that are asked in turns, at random, under one budget (paper, figure 8).

Nothing can be guessed here: what counts is which parts of which models stay in memory. Sides, budget and
preparation are those of `bench workflows`; every request is a run of one step.
"""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import Usage
from ..flexmem.processors import PROCESSORS
from . import machine, workflow_file
from .files import Progress, Say
from .stats import Spread
from .workflow_file import Step, Workflow
from .workflow_plan import make_plan
from .workflow_policy import TIMER_S
from .workflow_report import ratios
from .workflow_run import POLICIES, Done, check_policies, make_sides, run_plan
from .workflows import USUAL_QUANT, described, make_setting

USUAL_GROUPS = ("s+l", "xs+s", "xs+l", "s+m", "xs+s+l")


@dataclass(frozen=True)
class GroupsOptions:
    """What to measure. Groups are model classes joined by `+`. `budget_bytes` 0: half of a group's weights, or what its
    largest model takes."""

    groups: tuple[str, ...] = USUAL_GROUPS
    policies: tuple[str, ...] = POLICIES
    rounds: int = 3
    requests: int = 8  # a round
    warm: int = 2  # requests to each model before the first round, for what learns
    prompt_tokens: int = 128
    output_tokens: int = 32
    budget_bytes: int = 0
    quant: str = USUAL_QUANT
    think_s: float = 150.0
    seed: int | None = None
    directory: Path = Path("bench")
    threads: int = 0  # 0: all cores
    shapes: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        check_policies(self.policies)

    @property
    def compute_threads(self) -> int:
        return self.threads or len(PROCESSORS)


def run(options: GroupsOptions, say: Say, progress: Progress | None = None) -> dict[str, Any]:
    """Measure; the result is what `--json` prints (docs/schemas/bench-groups.json).

    Raises `Usage`, `StorageFailure`, `EngineFailure`, `OutOfBudget`.
    """
    file = workflow_file.load()
    shapes = options.shapes or {name: file.shape(name) for name in file.classes}
    members = {group: _members(group, shapes) for group in dict.fromkeys(options.groups)}
    seed = secrets.randbits(32) if options.seed is None else options.seed
    found = {
        group: _group(group, names, options, {name: shapes[name] for name in names}, seed, say, progress)
        for group, names in members.items()
    }
    means, each = ratios(
        {
            group: {policy: row["mean_ttft_s"] for policy, row in one["results"].items()}
            for group, one in found.items()
        }
    )
    return {
        "bench": "groups",
        "machine": machine.describe(),
        "rounds": options.rounds,
        "requests": options.requests,
        "warm": options.warm,
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "think_s": options.think_s,
        "timer_s": TIMER_S,
        "seed": seed,
        "groups": found,
        "ratios": means,
        "ratios_by_group": each,
    }


def _members(group: str, shapes: Mapping[str, str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in group.split("+"))
    unknown = [name for name in names if name not in shapes]
    if unknown:
        raise Usage(f"no model class is called {unknown[0]!r}", hint=f"there are {', '.join(shapes)}")
    if len(set(names)) < max(len(names), 2):
        raise Usage(f"{group!r} is no group of different models", hint="join classes with +, as in s+l")
    return names


def _group(  # noqa: PLR0917
    group: str,
    names: Sequence[str],
    options: GroupsOptions,
    shapes: Mapping[str, str],
    seed: int,
    say: Say,
    progress: Progress | None,
) -> dict[str, Any]:
    requests = tuple(
        Workflow(name, (Step(name, 0, options.prompt_tokens, options.output_tokens),)) for name in names
    )
    plan = make_plan(requests, seed, options.rounds, options.warm, options.think_s, count=options.requests)
    with ExitStack() as stack:
        setting = make_setting(options, shapes, requests, stack, say, progress)
        say(f"group {group}, seed {seed}, budget {setting.budget_bytes / 1e9:.2f} GB")
        sides = make_sides(setting, stack, say)
        done = run_plan(setting, sides, plan, say)
    return {
        **described(setting, shapes, options.quant),
        "skipped": sides.skipped,
        "results": {side.name: _result(side.name, names, done) for side in sides.sides},
    }


def _result(policy: str, names: Sequence[str], done: Sequence[Done]) -> dict[str, Any]:
    """The mean counts: the same requests find their model in memory or not, and a median would show one of the two."""
    mine = [one for one in done if one.policy == policy]
    return {
        "mean_ttft_s": statistics.mean(one.latency_s for one in mine),
        "ttft_s": {
            name: asdict(Spread.of(values))
            for name in names
            if (values := [one.latency_s for one in mine if one.workflow == name])
        },
        "requests": [
            {
                "round": one.round,
                "model": one.workflow,
                "ttft_s": one.latency_s,
                "load_bytes": one.answers[0].load_bytes,
                "first_touch_s_per_gb": one.first_touch_s_per_gb,
            }
            for one in mine
        ],
    }
