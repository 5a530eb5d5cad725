"""What is asked, in which order, with which tokens: the same for every side. Pure; everything follows from a seed.

Knows workflows and numbers of tokens; no model and no clock.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import Usage
from .workflow_file import Workflow

PRIMED_TOKENS = 1  # of output, where only the KV of a prompt's constant part is wanted


@dataclass(frozen=True)
class Turn:
    """One run of a workflow. `pause_s`: since the one before, as the timer sees it; nobody waits for it."""

    workflow: Workflow
    number: int  # the variable part of its prompts follows from it
    pause_s: float = 0.0


@dataclass(frozen=True)
class Round:
    """`lead_in` brings memory into the state of use after everything was given back; it does not count."""

    lead_in: Turn
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Plan:
    """`warm`: before the first round, for sides that learn."""

    seed: int
    workflows: tuple[Workflow, ...]
    warm: tuple[Turn, ...]
    rounds: tuple[Round, ...]

    def constant(self, workflow: Workflow, step: int, vocabulary: int) -> tuple[int, ...]:
        """The token ids with which every prompt of a step begins."""
        place = self.workflows.index(workflow)
        return _ids((self.seed, 0, place, step), vocabulary, workflow.steps[step].constant_tokens)

    def prompt(self, turn: Turn, step: int, vocabulary: int) -> tuple[int, ...]:
        """The whole prompt of a step."""
        variable = turn.workflow.steps[step].variable_tokens
        return self.constant(turn.workflow, step, vocabulary) + _ids(
            (self.seed, 1, turn.number, step), vocabulary, variable
        )

    def unrelated(self, turn: Turn, count: int, vocabulary: int) -> tuple[int, ...]:
        """Token ids of a request that no step has."""
        return _ids((self.seed, 2, turn.number), vocabulary, count)


def make_plan(  # noqa: PLR0917
    workflows: Sequence[Workflow], seed: int, rounds: int, warm: int, think_s: float, count: int | None = None
) -> Plan:
    """Each round has every workflow once in a random order, or `count` that are drawn at random.

    `warm`: passes before the first round. `think_s`: mean of the pauses, which are drawn from an exponential
    distribution. Raises `Usage` for a workflow whose steps are no chain.
    """
    for workflow in workflows:
        if not workflow.is_chain:
            raise Usage(f"the steps of {workflow.name} are no chain: the bench measures chains only")
    rng = random.Random(seed)  # noqa: S311 - no secret
    turns = _Turns(rng, think_s)
    warming = tuple(
        turns.next(workflow) for _ in range(warm) for workflow in rng.sample(workflows, len(workflows))
    )
    made = []
    for _ in range(rounds):
        lead_in = turns.next(rng.choice(workflows))
        order = rng.choices(workflows, k=count) if count else rng.sample(workflows, len(workflows))
        made.append(Round(lead_in, tuple(turns.next(workflow) for workflow in order)))
    return Plan(seed, tuple(workflows), warming, tuple(made))


class _Turns:
    """Numbers them, and draws the pauses."""

    def __init__(self, rng: random.Random, think_s: float) -> None:
        self._rng, self._think_s = rng, think_s
        self._numbers = itertools.count(1)

    def next(self, workflow: Workflow) -> Turn:
        pause_s = self._rng.expovariate(1 / self._think_s) if self._think_s else 0.0
        return Turn(workflow, next(self._numbers), pause_s)


def primes(plan: Plan, vocabularies: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Model class and token ids of every constant part, each once: what an app would send when it is installed."""
    for workflow in plan.workflows:
        for number, step in enumerate(workflow.steps):
            if step.constant_tokens:
                yield step.model, plan.constant(workflow, number, vocabularies[step.model])


def _ids(seed: tuple[int, ...], vocabulary: int, count: int) -> tuple[int, ...]:
    """Uniformly random token ids."""
    return tuple(int(token) for token in np.random.default_rng(seed).integers(0, vocabulary, count))
