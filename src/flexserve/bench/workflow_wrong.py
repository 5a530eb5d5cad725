"""What a wrong guess costs: an app does not ask what prefetch brought, and another app asks something else at once.

The same is done with prefetch switched off; the request of the other app is compared. Also how long loading a model
takes with nothing else to do. Knows the two sides of FlexServe; everything happens after the rounds.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from .files import Say
from .workflow_plan import Plan, Turn
from .workflow_run import SERVED, Setting, Side, Sides, ask, clear, run_turn
from .workflow_sides import Answer, Asked

FIRST_NUMBER = 1 << 20  # of turns that no plan has
UNRELATED_TOKENS, UNRELATED_OUTPUT = 128, 16
UNRELATED = "unrelated"


@dataclass(frozen=True)
class WrongGuess:
    """One request after a wrong guess, and the same one where nothing was guessed. Seconds, to the last token."""

    workflow: str
    guessed_model: str
    asked_model: str
    total_s: float
    no_prefetch_total_s: float

    @property
    def ratio(self) -> float:
        return self.total_s / self.no_prefetch_total_s


@dataclass(frozen=True)
class WrongGuesses:
    """`cost`: median of the ratios, less 1."""

    cost: float
    guesses: list[WrongGuess]


def wrong_guesses(setting: Setting, sides: Sides, plan: Plan, count: int, say: Say) -> WrongGuesses | None:
    """Each is preceded by a right run of the same workflow, so that the guess is made. None where no workflow's second
    step has another model than its first."""
    able = [w for w in plan.workflows if len(w.steps) > 1 and w.steps[0].model != w.steps[1].model]
    if not able:
        return None
    found = []
    for number in range(count):
        workflow = able[number % len(able)]
        guessed = workflow.steps[1].model
        others = [model for model in setting.models if model != guessed]
        other = others[number // len(able) % len(others)]
        answers: dict[str, Answer] = {}
        for name in SERVED if number % 2 else SERVED[::-1]:
            side = sides.named(name)
            assert side is not None
            answers[name] = _after_wrong_guess(
                setting, side, sides, plan, Turn(workflow, _number(number)), other
            )
        with_it, without = (answers[name].end_s - answers[name].begin_s for name in reversed(SERVED))
        found.append(WrongGuess(workflow.name, guessed, other, with_it, without))
        say(f"wrong guess of {guessed}: {other} took {with_it:.2f} s, {without:.2f} without")
    for name in SERVED:
        side = sides.named(name)
        assert side is not None
        clear(side)
    return WrongGuesses(statistics.median(one.ratio for one in found) - 1, found)


def _number(number: int) -> int:
    return FIRST_NUMBER + 2 * number


def _after_wrong_guess(  # noqa: PLR0917
    setting: Setting, side: Side, sides: Sides, plan: Plan, turn: Turn, other: str
) -> Answer:
    run_turn(setting, side, sides.clock, plan, turn)
    again = Turn(turn.workflow, turn.number + 1)
    run_turn(setting, side, sides.clock, plan, again, steps=1)
    prompt = plan.unrelated(again, UNRELATED_TOKENS, setting.vocabularies[other])
    return ask(side, sides.clock, Asked(other, prompt, UNRELATED_OUTPUT, client=UNRELATED))


def load_seconds(setting: Setting, side: Side, say: Say) -> dict[str, float]:
    """Of each model: the time to the first token of a prompt of one, with nothing in memory."""
    found = {}
    for model in setting.models:
        clear(side)
        side.backend.ready([model])
        found[model] = side.backend.ask(Asked(model, (0,), 1)).ttft_s
        say(f"loading {model} takes {found[model]:.2f} s")
    clear(side)
    return found
