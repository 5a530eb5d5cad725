"""Plans: the same seed gives the same prompts, and what is constant in a prompt stays."""

from __future__ import annotations

import pytest

from flexserve.bench.workflow_file import Step, Workflow, load
from flexserve.bench.workflow_plan import make_plan, primes
from flexserve.errors import Usage

WORKFLOWS = load().workflows
VOCABULARIES = {"xs": 100, "s": 200, "m": 300, "l": 400}


def test_every_round_has_every_workflow_once_in_another_order() -> None:
    plan = make_plan(WORKFLOWS, 1, rounds=3, warm=2, think_s=150.0)
    names = [[turn.workflow.name for turn in one.turns] for one in plan.rounds]
    assert all(sorted(one) == sorted(w.name for w in WORKFLOWS) for one in names)
    assert names[0] != names[1] != names[2]
    assert len(plan.warm) == 2 * len(WORKFLOWS)
    turns = [*plan.warm, *(t for one in plan.rounds for t in (one.lead_in, *one.turns))]
    assert len({turn.number for turn in turns}) == len(turns)
    assert 50 < sum(turn.pause_s for turn in turns) / len(turns) < 300


def test_the_seed_decides_everything() -> None:
    def everything(seed: int) -> object:
        plan = make_plan(WORKFLOWS, seed, 2, 1, 10.0)
        return plan, [plan.prompt(t, 0, 100) for one in plan.rounds for t in one.turns]

    assert everything(7) == everything(7) != everything(8)


def test_a_prompt_is_its_constant_part_and_other_tokens_in_every_run() -> None:
    plan = make_plan(WORKFLOWS, 3, 2, 0, 0.0)
    workflow = WORKFLOWS[0]
    step = workflow.steps[1]
    first, second = (
        plan.prompt(turn, 1, 400) for one in plan.rounds for turn in one.turns if turn.workflow is workflow
    )
    assert len(first) == len(second) == step.prompt_tokens
    assert first[: step.constant_tokens] == second[: step.constant_tokens] == plan.constant(workflow, 1, 400)
    assert first[step.constant_tokens :] != second[step.constant_tokens :]
    assert 0 <= min(first) <= max(first) < 400
    assert all(turn.pause_s == 0 for one in plan.rounds for turn in one.turns)
    assert plan.unrelated(plan.rounds[0].turns[0], 5, 400) != first[:5]


def test_constant_parts_are_computed_once_each_beforehand() -> None:
    plan = make_plan(WORKFLOWS, 3, 1, 0, 0.0)
    found = list(primes(plan, VOCABULARIES))
    assert len(set(found)) == len(found) == sum(len(w.steps) for w in WORKFLOWS)
    assert {len(ids) for _, ids in found} == {s.constant_tokens for w in WORKFLOWS for s in w.steps}


def test_requests_may_be_drawn_instead() -> None:
    single = tuple(Workflow(name, (Step(name, 0, 8, 2),)) for name in ("s", "l"))
    plan = make_plan(single, 5, 2, 0, 0.0, count=20)
    assert [len(one.turns) for one in plan.rounds] == [20, 20]
    assert {turn.workflow.name for turn in plan.rounds[0].turns} == {"s", "l"}
    assert list(primes(plan, VOCABULARIES)) == []


def test_what_is_no_chain_is_refused() -> None:
    step = Step("s", 0, 8, 2)
    with pytest.raises(Usage, match="fork"):
        make_plan((Workflow("fork", (step, step)),), 1, 1, 0, 0.0)
