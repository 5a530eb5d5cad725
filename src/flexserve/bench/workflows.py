"""`flexserve bench workflows`: agent workflows over several models under one budget (paper, figure 9).

The workflows are those of workflows.toml at its `linux` shapes, with random weights and random token ids; each is an
app of its own, which runs it now and then. Policies of whole models run twice: `as_is` on plain llama.cpp, `fair` on
our own pipeline, sealed files and saved conversations, so that only caching and prefetch differ.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import Usage
from ..flexmem.processors import PROCESSORS
from . import machine, workflow_file
from .files import Progress, Say, prepare_model
from .shapes import shape_named
from .workflow_file import Workflow, WorkflowFile
from .workflow_plan import Plan, make_plan
from .workflow_policy import TIMER_S
from .workflow_report import by_workflow, hidden_loads, medians, prefetch_part, ratios
from .workflow_run import (
    POLICIES,
    Done,
    Setting,
    Sides,
    check_policies,
    context_tokens,
    make_sides,
    prime,
    run_plan,
)
from .workflow_wrong import load_seconds, wrong_guesses

USUAL_QUANT = (
    "Q8_0"  # the plain and the sealed sides have the same kernels: llama.cpp repacks none of it on x86
)


@dataclass(frozen=True)
class WorkflowsOptions:
    """What to measure. `budget_bytes` 0: half of all weights, `workflows` empty: all."""

    workflows: tuple[str, ...] = ()
    policies: tuple[str, ...] = POLICIES
    rounds: int = 3
    warm: int = 2  # passes over all workflows before the first round, for what learns
    wrong: int = 3  # wrong guesses to measure
    budget_bytes: int = 0
    quant: str = USUAL_QUANT
    think_s: float = 150.0  # mean pause between two workflows, for the timer
    seed: int | None = None
    directory: Path = Path("bench")
    threads: int = 0  # 0: all cores
    shapes: Mapping[str, str] | None = None  # of each class; None: the file's

    def __post_init__(self) -> None:
        check_policies(self.policies)

    @property
    def compute_threads(self) -> int:
        return self.threads or len(PROCESSORS)

    def chosen(self, file: WorkflowFile) -> tuple[Workflow, ...]:
        """Raises `NotFound`, `Usage`."""
        if len(set(self.workflows)) < len(self.workflows):
            raise Usage("a workflow is named twice")
        return tuple(file.named(name) for name in self.workflows) or file.workflows


def run(options: WorkflowsOptions, say: Say, progress: Progress | None = None) -> dict[str, Any]:
    """Measure; the result is what `--json` prints (docs/schemas/bench-workflows.json).

    Raises `NotFound`, `Usage`, `StorageFailure`, `EngineFailure`, `OutOfBudget`.
    """
    file = workflow_file.load()
    workflows = options.chosen(file)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    plan = make_plan(workflows, seed, options.rounds, options.warm, options.think_s)
    shapes = options.shapes or {name: file.shape(name) for name in file.classes}
    with ExitStack() as stack:
        setting = make_setting(options, shapes, workflows, stack, say, progress)
        say(f"seed {seed}, budget {setting.budget_bytes / 1e9:.2f} GB")
        sides = make_sides(setting, stack, say)
        prime(setting, sides, plan, say)
        done = run_plan(setting, sides, plan, say)
        prefetch, wrong = _prefetch_parts(options, setting, sides, plan, done, say)
    found = by_workflow(done)
    means, each = ratios(medians(found))
    return {
        "bench": "workflows",
        "machine": machine.describe(),
        **described(setting, shapes, options.quant),
        "rounds": options.rounds,
        "warm": options.warm,
        "think_s": options.think_s,
        "timer_s": TIMER_S,
        "seed": seed,
        "skipped": sides.skipped,
        "workflows": found,
        "ratios": means,
        "ratios_by_workflow": each,
        "prefetch": prefetch,
        "wrong_prefetch": wrong,
    }


def make_setting(  # noqa: PLR0917
    options: Any,
    shapes: Mapping[str, str],
    workflows: tuple[Workflow, ...],
    stack: ExitStack,
    say: Say,
    progress: Progress | None,
) -> Setting:
    """Make the models. The budget is half of the weights of all shapes where no other is asked for, or what the largest
    takes with its KV: less holds no model at all."""
    everything = {
        name: prepare_model(options.directory, shape, options.quant, say, progress)
        for name, shape in shapes.items()
    }
    used = {step.model for workflow in workflows for step in workflow.steps}
    context = context_tokens(workflows)
    half = sum(model.weight_bytes for model in everything.values()) // 2
    least = max(
        model.weight_bytes + context * kv_bytes_per_token(shapes[name]) for name, model in everything.items()
    )
    return Setting(
        models={name: model for name, model in everything.items() if name in used},
        vocabularies={name: shape_named(shape).vocabulary for name, shape in shapes.items()},
        budget_bytes=options.budget_bytes or max(half, least),
        threads=options.compute_threads,
        context_tokens=context,
        policies=options.policies,
        directory=Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="workflows-", dir=options.directory))
        ),
    )


def kv_bytes_per_token(shape_name: str) -> int:
    """Keys and values in 16 bits."""
    shape = shape_named(shape_name)
    return 4 * shape.layers * shape.kv_heads * shape.key_length


def described(setting: Setting, shapes: Mapping[str, str], quant: str) -> dict[str, Any]:
    """What was run on, for the JSON."""
    return {
        "quant": quant,
        "models": {
            name: {"shape": shapes[name], "weight_bytes": size} for name, size in setting.sizes.items()
        },
        "budget_bytes": setting.budget_bytes,
        "threads": setting.threads,
        "context_tokens": setting.context_tokens,
        "policies": list(setting.policies),
    }


def _prefetch_parts(  # noqa: PLR0917
    options: WorkflowsOptions, setting: Setting, sides: Sides, plan: Plan, done: list[Done], say: Say
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What prefetch saves where it can hide a load, and what a wrong guess costs; None without both sides."""
    without = sides.named("no_prefetch")
    if without is None or sides.named("flexserve") is None:
        return None, None
    load_s = load_seconds(setting, without, say)
    steps = {workflow.name: [step.model for step in workflow.steps] for workflow in plan.workflows}
    saved = prefetch_part(hidden_loads(done, steps, load_s), load_s)
    wrong = wrong_guesses(setting, sides, plan, options.wrong, say) if options.wrong else None
    return saved, asdict(wrong) if wrong is not None else None
