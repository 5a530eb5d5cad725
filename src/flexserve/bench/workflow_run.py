"""Runs a plan on every side, one at a time, and writes down when what happened.

Each side runs a whole round alone, beginning with nothing in memory and a lead-in that does not count; the order of
the sides turns from round to round. Before every run of a workflow free memory is brought into the backed state
(memory.py). Knows sides and plans; what the numbers come to is in workflow_report.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Usage
from . import memory, processor
from .files import BenchModel, Say
from .memory import FreeMemory, MemoryState
from .processor import BUSY_CORES, BUSY_S
from .workflow_file import Workflow
from .workflow_plan import PRIMED_TOKENS, Plan, Turn, primes
from .workflow_policy import TIMER_S, WHOLE_MODELS, WholeModels, refusal
from .workflow_sides import (
    Answer,
    Asked,
    Backend,
    Clock,
    Common,
    PlainModels,
    SealedModels,
    ServedModels,
)

KINDS = ("as_is", "fair")
SERVED = ("no_prefetch", "flexserve")
PAUSE_S = 1.5  # between two workflows at least: longer than GAP_S of the served worlds
POLICIES = (*(f"{policy}_{kind}" for policy in WHOLE_MODELS for kind in KINDS), *SERVED)


def check_policies(names: Sequence[str]) -> None:
    """Raises `Usage` where one is unknown, or none is there."""
    unknown = [name for name in names if name not in POLICIES]
    if unknown or not names:
        raise Usage(
            f"no policy is called {unknown[0]!r}" if unknown else "no policy is to be measured",
            hint=f"there are {', '.join(POLICIES)}",
        )


@dataclass(frozen=True)
class Done:
    """One run of a workflow on one side."""

    policy: str
    workflow: str
    round: int
    latency_s: float  # from the request to the first token of the last step
    answers: tuple[Answer, ...]
    first_touch_s_per_gb: float


@dataclass
class Side:
    """A policy over a backend; `whole`: None where the Framework decides."""

    name: str
    backend: Backend
    whole: WholeModels | None = None

    @property
    def learns(self) -> bool:
        """Whether what was asked before changes more than which model is in memory."""
        return self.whole is None


@dataclass(frozen=True)
class Setting:
    """What is run on. `vocabularies`: of each model class."""

    models: Mapping[str, BenchModel]
    vocabularies: Mapping[str, int]
    budget_bytes: int
    threads: int
    context_tokens: int
    policies: tuple[str, ...]
    directory: Path  # for saved conversations

    @property
    def sizes(self) -> dict[str, int]:
        return {name: model.weight_bytes for name, model in self.models.items()}

    @property
    def need_bytes(self) -> int:
        """What any side may take, in memory and in the page cache, and room for the rest."""
        return self.budget_bytes + (1 << 30)


@dataclass
class Sides:
    """The sides that are measured, and why the others are not."""

    clock: Clock
    sides: list[Side] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def named(self, name: str) -> Side | None:
        return next((side for side in self.sides if side.name == name), None)


def make_sides(setting: Setting, stack: ExitStack, say: Say) -> Sides:
    """Start what is wanted; `stack` ends it."""
    clock = Clock()
    made = Sides(clock)
    common = Common(
        setting.models, setting.threads, setting.context_tokens, setting.directory / "sessions", clock
    )
    backends: dict[str, Backend] = {}
    for policy in (policy for policy in POLICIES if policy in setting.policies):
        if policy in SERVED:
            say(f"starting the world of {policy}")
            served = ServedModels(common, policy, setting.budget_bytes, prefetch=policy == "flexserve")
            made.sides.append(Side(policy, stack.enter_context(closing(served))))
            continue
        name, kind = next((policy.removesuffix(f"_{k}"), k) for k in KINDS if policy.endswith(f"_{k}"))
        if why := refusal(name, setting.sizes, setting.budget_bytes):
            made.skipped[policy] = why
            continue
        if kind not in backends:
            say(f"starting what the {kind} sides share")
            backend = PlainModels(common) if kind == "as_is" else SealedModels(common)
            backends[kind] = stack.enter_context(closing(backend))
        whole = WholeModels(name, setting.sizes, setting.budget_bytes, TIMER_S)
        made.sides.append(Side(policy, backends[kind], whole))
    return made


def prime(setting: Setting, sides: Sides, plan: Plan, say: Say) -> None:
    """Have every side that keeps conversations compute the constant prompts once; then give everything back."""
    for backend in dict.fromkeys(side.backend for side in sides.sides):
        if isinstance(backend, PlainModels):
            continue
        say("computing the constant parts of the prompts")
        backend.ready(list(setting.models))
        for model, token_ids in primes(plan, setting.vocabularies):
            backend.ask(Asked(model, token_ids, PRIMED_TOKENS))
        backend.clear()


def run_plan(setting: Setting, sides: Sides, plan: Plan, say: Say) -> list[Done]:
    """Everything that counts, in the order it was measured. Raises `EngineFailure`, `OutOfBudget`."""
    done: list[Done] = []
    free = memory.free_memory(MemoryState.BACKED, setting.need_bytes)
    try:
        for number, one in enumerate(plan.rounds):
            busy = processor.busy_cores(BUSY_S)
            if busy > BUSY_CORES:
                say(f"other programs keep {busy:.1f} cores busy: these times are longer than this machine's")
            order = sides.sides[::-1] if number % 2 else sides.sides
            for side in order:
                say(f"round {number + 1} of {len(plan.rounds)}: {side.name}")
                before = plan.warm if side.learns and not number else ()
                for turn in (*before, one.lead_in):
                    run_turn(setting, side, sides.clock, plan, turn)
                for turn in one.turns:
                    done.append(run_turn(setting, side, sides.clock, plan, turn, number, free))
                    say(f"  {turn.workflow.name:<20}{done[-1].latency_s:8.2f} s   {_parts(done[-1].answers)}")
                clear(side)
    finally:
        free.close()
    return done


def clear(side: Side) -> None:
    """Nothing of it stays in memory."""
    side.backend.clear()
    if side.whole is not None:
        side.whole.everything()


def run_turn(  # noqa: PLR0917
    setting: Setting,
    side: Side,
    clock: Clock,
    plan: Plan,
    turn: Turn,
    number: int = -1,
    free: FreeMemory | None = None,
    steps: int | None = None,
) -> Done:
    """Run a workflow, or its first `steps`; with `free`, after preparing memory."""
    workflow = turn.workflow
    side.backend.ready([step.model for step in workflow.steps])
    clock.skip(turn.pause_s)
    if side.whole is not None:
        for gone in side.whole.expired(clock.now()):
            side.backend.give_back(gone)
    touch = 0.0
    if free is None:
        time.sleep(PAUSE_S)
    else:
        free.prepare()
        touch = free.release().first_touch_s_per_gb
    begin = clock.now()
    answers = [
        ask(side, clock, _asked(setting, plan, turn, step)) for step in range(len(workflow.steps))[:steps]
    ]
    return Done(side.name, workflow.name, number, answers[-1].first_s - begin, tuple(answers), touch)


def ask(side: Side, clock: Clock, asked: Asked) -> Answer:
    """One request, and what a policy of whole models does before and after it."""
    if side.whole is None:
        return side.backend.ask(asked)
    for gone in side.whole.needed(asked.model, clock.now()):
        side.backend.give_back(gone)
    answer = side.backend.ask(asked)
    for gone in side.whole.answered(asked.model, clock.now()):
        side.backend.give_back(gone)
    return answer


def _asked(setting: Setting, plan: Plan, turn: Turn, number: int) -> Asked:
    step = turn.workflow.steps[number]
    prompt = plan.prompt(turn, number, setting.vocabularies[step.model])
    return Asked(step.model, prompt, step.output_tokens, client=turn.workflow.name)


def _parts(answers: Sequence[Answer]) -> str:
    return ", ".join(f"{a.ttft_s:.2f} + {a.decode_s:.2f}" for a in answers)


def context_tokens(workflows: Sequence[Workflow]) -> int:
    """A context for the longest step, in the steps in which KV grows."""
    longest = max(step.prompt_tokens + step.output_tokens for w in workflows for step in w.steps)
    return max(512, -(-longest // 256) * 256)
