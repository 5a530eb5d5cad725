"""The workflow log: what it learns, forgets and keeps; and what the Framework fetches before it is asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from flexserve.framework import effects as ef
from flexserve.framework import events as ev
from flexserve.framework import workflow_state
from flexserve.framework.effects import Why
from flexserve.framework.settings import Settings
from flexserve.framework.weights import Part
from flexserve.framework.workflows import MAX_CLIENTS, Prediction, Step, WorkflowLog

from .executor import Answer, Executor

MIB = 1 << 20
SETTINGS = Settings()
DAY = 86400.0
A, B, C = Step("a", "pa"), Step("b", "pb"), Step("c", "pc")


def told(log: WorkflowLog, *steps: Step, client: str = "", at: float = 0.0) -> float:
    """A client's requests, a second apart; the time of the next."""
    for number, step in enumerate(steps):
        log.step(at + number, client, step, SETTINGS)
    return at + len(steps)


def after(log: WorkflowLog, now: float, client: str = "") -> Step | None:
    found = log.predict(now, client, SETTINGS)
    return None if found is None else found.step


# The log


def test_what_came_twice_is_expected_and_what_came_once_is_not() -> None:
    log = WorkflowLog()
    now = told(log, A, B, A)
    assert after(log, now) is None
    now = told(log, B, A, at=now)
    assert after(log, now) == B


def test_clients_do_not_learn_from_each_other() -> None:
    log = WorkflowLog()
    now = told(log, A, B, A, B, A, client="one")
    now = told(log, A, client="two", at=now)
    assert after(log, now, "one") == B
    assert after(log, now, "two") is None


def test_the_prompts_beginning_tells_workflows_of_one_model_apart() -> None:
    log = WorkflowLog()
    other = Step("a", "other prompt")
    now = told(log, *(A, B, other, C) * 3, A)
    assert after(log, now) == B
    now = told(log, B, other, at=now)
    assert after(log, now) == C


def test_the_step_before_tells_apart_what_the_last_one_does_not() -> None:
    log = WorkflowLog()
    now = told(log, *(A, B, A, C, B, C) * 4)  # behind a and c comes b, behind b and a comes c
    now = told(log, B, A, at=now)
    assert after(log, now) == C


def test_with_unknown_prompts_the_model_alone_predicts() -> None:
    log = WorkflowLog()
    now = told(log, *(Step("a", str(n // 2)) if n % 2 == 0 else Step("b", str(n)) for n in range(9)))
    assert after(log, now) == Step("b", "7")


def test_the_end_of_a_workflow_is_learned_too() -> None:
    log, now = WorkflowLog(), 0.0
    for _ in range(4):
        now = told(log, A, B, at=now) + 10 * SETTINGS.workflow_gap_s
    assert log.predict(now, "", SETTINGS) is None  # behind b nothing comes
    now = told(log, A, at=now)
    assert after(log, now) == B


def test_a_habit_that_changes_is_forgotten_after_some_observations() -> None:
    log = WorkflowLog()
    now = told(log, *(A, B) * 30, A)
    changed = 0
    while after(log, now) != C:
        now = told(log, C, A, at=now)
        changed += 1
        assert changed < 15
    assert changed > 1


def test_old_observations_fade_with_time() -> None:
    log = WorkflowLog()
    now = told(log, A, B, A, B, A)
    assert after(log, now) == B
    assert after(log, now + 30 * DAY) is None


def test_what_a_client_declares_is_expected_at_once_and_can_be_wrong() -> None:
    log = WorkflowLog()
    log.declare(0.0, "c", "trip", ("a", "b", "a", "c"), SETTINGS)
    now = told(log, Step("a", "x"), client="c")
    now = told(log, Step("b", "y"), Step("a", "z"), client="c", at=now)
    assert after(log, now, "c") == Step("c")  # behind b and a, not behind a alone
    (entry,) = [e for e in log.entries(now, SETTINGS) if e.next_model == "c"]
    assert entry.declared == "trip"
    for _ in range(12):
        now = told(log, Step("b", "y"), Step("a", "z"), client="c", at=now)
    assert after(log, now, "c") == Step("b", "y")


def test_a_hint_needs_no_confidence_and_finds_the_prompt_that_usually_follows() -> None:
    log = WorkflowLog()
    now = told(log, A, B, A)
    assert log.hinted("", "b") == Prediction("", "a", B, 1.0)
    assert log.hinted("new", "c") == Prediction("new", "", Step("c"), 1.0)
    assert now


def test_forgetting_one_line_one_client_and_everything() -> None:
    log = WorkflowLog()
    now = told(log, *(A, B) * 3, client="one")
    told(log, *(A, B) * 3, client="two")
    lines = log.entries(now, SETTINGS)
    (line,) = [e for e in lines if (e.client, e.next_model) == ("one", "b")]
    assert log.forget(entry=line.id) == 1
    assert log.forget("two") == 2
    assert [(e.client, e.steps, e.next_model) for e in log.entries(now, SETTINGS)] == [("one", ("b",), "a")]
    assert log.forget() == 1
    assert log.entries(now, SETTINGS) == []


STEPS = st.tuples(
    st.sampled_from(["", *(f"c{n}" for n in range(6))]),
    st.builds(Step, st.sampled_from("abcdefghijklmnop"), st.sampled_from(["", "p", "q", "r"])),
    st.floats(0, 200),
)


@hypothesis_settings(deadline=None, max_examples=50)
@given(steps=st.lists(STEPS, max_size=150), limit=st.integers(1, 30))
def test_whatever_is_told_memory_is_bounded_and_the_dump_is_all_of_it(
    steps: list[tuple[str, Step, float]], limit: int
) -> None:
    settings = replace(SETTINGS, workflow_limit=limit)
    log, now = WorkflowLog(), 0.0
    for client, step, later in steps:
        now += later
        log.step(now, client, step, settings)
        found = log.predict(now, client, settings)
        assert found is None or settings.prefetch_confidence <= found.confidence < 1
    assert len(log.followers) <= limit
    assert all(len(f.tallies) <= 8 for f in log.followers.values())
    data = json.loads(json.dumps(workflow_state.dump(log, now)))
    again = workflow_state.load(data, 5.0, 0.0, settings)
    assert workflow_state.dump(again, 5.0)["totals"] == data["totals"]
    for one, other in zip(workflow_state.dump(again, 5.0)["followers"], data["followers"], strict=True):
        assert one[2] == pytest.approx(other[2], abs=1e-6)
        assert one[:2] + one[3:] == other[:2] + other[3:]


def test_thousands_of_clients_take_bounded_memory() -> None:
    log = WorkflowLog()
    for number in range(4000):
        told(log, A, B, client=f"c{number}", at=float(number))
    assert len(log._recent) <= MAX_CLIENTS
    assert len(log.followers) <= SETTINGS.workflow_limit


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@hypothesis_settings(deadline=None, max_examples=80)
@given(data=st.data(), junk=VALUES)
def test_a_dump_of_another_form_is_refused_whatever_it_is(data: st.DataObject, junk: Any) -> None:
    log = WorkflowLog()
    told(log, *(A, B, C) * 3)
    dump = json.loads(json.dumps(workflow_state.dump(log, 9.0)))
    node: Any = dump
    while True:  # replace something, somewhere
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if isinstance(node[key], list) and node[key] and data.draw(st.booleans()):
            node = node[key]
            continue
        node[key] = junk
        break
    try:
        again = workflow_state.load(dump, 9.0, 0.0, SETTINGS)
    except ValueError:
        return
    told(again, A, B, at=10.0)  # what was taken can be gone on with
    again.entries(20.0, SETTINGS)
    workflow_state.load(json.loads(json.dumps(workflow_state.dump(again, 20.0))), 0.0, 0.0, SETTINGS)


# Prefetch

BODY = (Part(0, 100, MIB, 100 * MIB),)
TIGHT = Settings(budget_bytes=220 * MIB, cap_bytes=1000 * MIB, lazy=False, prefetch_ahead_bytes=8 * MIB)


def world(settings: Settings = TIGHT, models: str = "abc") -> Executor:
    made = Executor(settings)
    for name in models:
        made.register(name, BODY, 1000)
    return made


def begin(made: Executor, name: str, model: str, **said: Any) -> None:
    """A request that decodes."""
    made.now += 1.0
    made.ask(name, Answer(model, f"{model}/{name}", 100, client="c", prefix=f"p{model}", **said))
    made.drain()
    made.step(name)
    made.drain()


def end(made: Executor, name: str) -> None:
    made.finish(name)
    made.drain()
    made.check()


def turns(made: Executor, models: str, first: int = 0) -> None:
    for number, model in enumerate(models, first):
        begin(made, f"r{number}", model)
        end(made, f"r{number}")


def fetched(made: Executor, model: str, why: Why, since: int = 0) -> int:
    return sum(
        int(d.facts["nbytes"])
        for _, _, ds in made.log[since:]
        for d in ds
        if isinstance(d.effect, ef.LoadRange) and d.effect.model == model and d.why == why
    )


def found(made: Executor, name: str) -> int:
    starts = [d.effect for _, _, ds in made.log for d in ds if isinstance(d.effect, ef.StartRequest)]
    return next(s.prefetched_bytes for s in starts if s.request == name)


def emptied(made: Executor, *models: str) -> None:
    """Take the weights of these away, as a recall would, and give the memory back."""
    made.post(ev.PressureRecall(1, 10_000 * MIB, None))
    made.drain()
    made.post(ev.BudgetSet(made.framework.settings.cap_bytes if not models else TIGHT.budget_bytes))
    made.drain()


def test_the_next_model_of_a_repeated_sequence_is_fetched_while_the_one_before_decodes() -> None:
    made = world()
    turns(made, "abcabcab")  # a is followed by b, and b by c; two of them fit
    since = len(made.log)
    begin(made, "x", "c")
    before = made.images["a"].resident
    assert fetched(made, "a", Why.PREDICTED, since) + before > 0
    assert made.images["a"].resident > 90 * MIB  # while c still decodes
    end(made, "x")
    begin(made, "y", "a")
    assert found(made, "y") == fetched(made, "a", Why.PREDICTED, since) > 0
    totals, entries = made.framework.workflows()
    assert totals.hits >= 1
    assert totals.nbytes >= found(made, "y")
    (line,) = [e for e in entries if e.steps == ("c",) and e.next_model == "a"]
    assert line.hits >= 1
    assert line.saved_s > 0


def test_with_prefetch_off_nothing_is_fetched() -> None:
    made = world(replace(TIGHT, prefetch=False))
    turns(made, "abcabcabcabc")
    assert not any(
        isinstance(d.effect, ef.LoadRange) and d.effect.priority == ef.Priority.PREFETCH
        for _, _, ds in made.log
        for d in ds
    )
    assert made.framework.workflows()[0].predictions == 0


def test_a_hint_is_followed_at_the_first_time() -> None:
    made = world()
    begin(made, "r1", "a", next_model="b")
    assert made.images["b"].resident == 100 * MIB
    end(made, "r1")
    begin(made, "r2", "b")
    assert found(made, "r2") == 100 * MIB


def test_nothing_is_taken_for_a_model_of_which_no_segment_would_fit() -> None:
    kv = MIB
    slack = kv * TIGHT.kv_chunk_tokens  # what a's request would need beside its weights
    made = Executor(replace(TIGHT, budget_bytes=slack + MIB // 2))
    made.register("a", BODY, kv)
    made.register("b", (Part(0, 8, MIB, 8 * MIB),), 1)
    made.register("c", (Part(0, 1, MIB, MIB),), 1)  # so that b is not all that is asked for
    for name, model, client, hint in (("r0", "c", "z", ""), ("r1", "b", "x", "a"), ("r2", "b", "y", "b")):
        made.ask(name, Answer(model, f"{model}/{name}", 1, client=client, next_model=hint))
        made.drain()
        made.step(name)
        end(made, name)  # which comes to rest: taken from b in vain, it would be fetched for b again
    assert made.images["b"].resident == 8 * MIB
    assert made.images["a"].resident == 0


def test_a_declared_workflow_is_followed_at_the_first_time() -> None:
    made = world()
    made.post(ev.WorkflowDeclared("c", "trip", ("a", "b")))
    begin(made, "r1", "a")
    assert made.images["b"].resident == 100 * MIB


def test_the_model_of_a_waiting_request_is_fetched_while_another_decodes() -> None:
    made = world()
    begin(made, "r1", "a")
    made.ask("r2", Answer("b", "b/r2", 100, client="other"))
    made.drain()
    assert made.images["b"].resident == 100 * MIB
    assert made.answers["r2"].state == "queued"
    end(made, "r1")
    assert found(made, "r2") == 100 * MIB


def test_nothing_is_fetched_while_a_cold_start_is_under_way() -> None:
    made = world(replace(TIGHT, compute_slots=2))
    begin(made, "r1", "a", next_model="b")
    made.post(ev.PressureRecall(1, 400 * MIB, None))
    made.drain()
    made.post(ev.BudgetSet(220 * MIB))
    made.ask("r2", Answer("c", "c/r2", 100, client="d", next_model="b"))
    for _ in range(60):
        if made.images["c"].resident >= 100 * MIB:
            break
        assert not made.images["b"].plan.get(ef.Priority.PREFETCH)
        for queue in list(made.queues):
            made.run(queue)
        for name in made.loading():
            made.load(name)


def test_a_wrong_guess_is_stopped_and_counted_and_the_other_request_is_answered() -> None:
    made = world()
    begin(made, "r1", "a")
    end(made, "r1")
    made.now += 1.0
    made.ask("r2", Answer("a", "a/r2", 100, client="c", prefix="pa", next_model="b"))
    for key in ("request r2", "kv a/r2"):
        made.run(key)
    made.step("r2")
    for _ in range(6):  # some of b, not all
        made.load("b")
    assert made.images["b"].resident > 0
    end_of = made.answers["r2"]
    assert end_of.state == "computing"
    made.finish("r2")
    made.ask("r3", Answer("c", "c/r3", 100, client="c", prefix="pc"))
    made.drain()
    made.step("r3")
    made.finish("r3")
    made.drain()
    assert made.answers["r3"].ended == "finished"
    assert made.images["b"].resident < 100 * MIB
    assert any(d.why == Why.WRONG_GUESS for _, _, ds in made.log for d in ds)
    totals, _ = made.framework.workflows()
    assert (totals.predictions, totals.hits) == (1, 0)
    assert totals.wasted > 0


def test_a_request_that_does_not_come_in_time_was_a_wrong_guess() -> None:
    made = world()
    begin(made, "r1", "a", next_model="b")
    end(made, "r1")
    due = made.framework.due()
    assert due is not None
    assert due <= made.now + TIGHT.prefetch_wait_s
    made.now = due
    made.post(ev.Tick())
    made.drain()
    totals, _ = made.framework.workflows()
    assert (totals.predictions, totals.hits, totals.wasted) == (1, 0, 100 * MIB)


def test_a_recall_ends_prefetch_and_takes_what_it_brought() -> None:
    made = world()
    begin(made, "r1", "a", next_model="b")
    assert made.images["b"].resident == 100 * MIB
    made.post(ev.PressureRecall(1, 90 * MIB, None))
    made.drain()
    assert made.images["b"].resident <= 15 * MIB  # the model that computes keeps all of it
    assert made.images["a"].resident == 100 * MIB
    since = len(made.log)
    made.post(ev.Tick())
    made.drain()
    assert fetched(made, "b", Why.HINTED, since) == 0


def test_prefetch_takes_nothing_that_caching_values_more() -> None:
    made = world()
    turns(made, "b" * 40)  # b is what everybody asks
    begin(made, "first", "a")  # together they are all that fits
    end(made, "first")
    made.framework._records.settings = replace(TIGHT, prefetch_confidence=0.5)
    turns(made, "accacc" * 2, first=100)  # behind a comes c, often enough
    turns(made, "b" * 40, first=200)
    begin(made, "x", "a")
    there = made.images["b"].resident
    assert there > 90 * MIB
    (expected,) = made.framework._records.expected.values()
    assert expected.prediction.step.model == "c"
    assert expected.prediction.confidence < 0.9  # less than b's share of the requests
    assert made.images["b"].resident == there
    assert made.images["c"].resident < 30 * MIB


def test_the_kv_of_the_next_prompts_beginning_is_read_back_before_it_comes() -> None:
    made = world(replace(TIGHT, save_after_s=1.0))
    turns(made, "ababab")
    made.now += 5.0
    for _ in range(8):
        made.post(ev.Tick())
        made.drain()
    made.post(ev.PressureRecall(1, 10_000 * MIB, None))
    made.drain()
    made.post(ev.BudgetSet(220 * MIB))
    newest = "b/r5"
    assert made.framework._records.sessions[newest].state.value == "stored"
    made.now += 1.0
    since = len(made.log)
    begin(made, "x", "a")
    assert made.framework._records.sessions[newest].state.value == "saved"
    end(made, "x")
    begin(made, "y", "b")
    kv = made.framework._records.sessions[newest].nbytes
    assert found(made, "y") == kv + fetched(made, "b", Why.PREDICTED, since) > kv > 0


def test_a_wrong_prediction_takes_no_memory_beyond_the_budget() -> None:
    made = world()
    for number in range(6):
        begin(made, f"r{number}", "abc"[number % 3], next_model="abc"[(number + 2) % 3])
        assert made.framework.view().held <= TIGHT.budget_bytes
        end(made, f"r{number}")
