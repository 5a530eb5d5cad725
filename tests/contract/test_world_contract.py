"""What every world promises (worlds/base.py), told once and run against each."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable

import pytest

from flexserve.core import Finished, FinishReason, Message, Request, Sampling, Token
from flexserve.errors import (
    ContextOverflow,
    EngineFailure,
    FlexServeError,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    WorldCrashed,
)
from flexserve.worlds.base import Generation, ModelSource, World

from .subjects import Subject

GREEDY = Sampling(temperature=0)
_ids = itertools.count()


def ask(
    subject: Subject,
    prompt: str = "Wake me at seven.",
    *,
    max_tokens: int | None = 12,
    stop: tuple[str, ...] = (),
    ignore_eos: bool = True,
    sampling: Sampling = GREEDY,
    model: str | None = None,
) -> Generation:
    """Queue one request with a fresh id. `ignore_eos` makes the length predictable on every world."""
    return subject.world.generate(
        Request(
            id=f"test-{next(_ids)}",
            model=model or subject.source.name,
            prompt=prompt,
            max_tokens=max_tokens,
            stop=stop,
            ignore_eos=ignore_eos,
            sampling=sampling,
        )
    )


def long_answer(subject: Subject) -> Generation:
    """An answer that takes long enough to be disturbed."""
    return ask(subject, max_tokens=400)


def finish(generation: Generation) -> Finished:
    """Read to the end, checking the order of events."""
    tokens: list[Token] = []
    for event in generation:
        if isinstance(event, Finished):
            assert list(generation) == [], "nothing follows the end"
            check(tokens, event)
            return event
        tokens.append(event)
    raise AssertionError("the answer ended without a Finished event")


def check(tokens: list[Token], finished: Finished) -> None:
    """The pieces are the whole: ids one by one; text except what was held back to the last moment."""
    assert tuple(t.id for t in tokens) == finished.token_ids
    assert finished.text.startswith("".join(t.text for t in tokens))
    assert finished.timings.output_tokens == len(finished.token_ids)


@pytest.fixture
def ready(subject: Subject) -> Subject:
    """The subject with its model registered."""
    subject.world.register(subject.source)
    return subject


# Registering


def test_registering_describes_the_model_and_loads_no_weights(subject: Subject) -> None:
    info = subject.world.register(subject.source)
    assert info.name == subject.source.name
    assert info.weight_bytes > 0
    assert info.context_tokens >= 512
    (model,) = subject.world.status().models
    assert model.info == info
    assert model.resident_bytes == 0
    assert model.requests == 0
    assert model.last_used_s_ago is None
    assert not model.poisoned


def test_what_must_not_be_registered_is_refused_each_with_its_own_error(subject: Subject) -> None:
    assert subject.refused
    for what, (source, error) in subject.refused.items():
        with pytest.raises(error) as caught:
            subject.world.register(source)
        assert caught.value.message, what
    assert subject.world.status().models == ()


def test_a_refused_model_leaves_the_others_answering(ready: Subject) -> None:
    for source, error in ready.refused.values():
        with pytest.raises(error):
            ready.world.register(source)
    assert finish(ask(ready)).finish_reason == FinishReason.LENGTH


# Answering


def test_an_answer_is_tokens_and_then_one_end(ready: Subject) -> None:
    finished = finish(ask(ready, max_tokens=12))
    assert finished.finish_reason == FinishReason.LENGTH
    assert len(finished.token_ids) == 12
    assert finished.timings.prompt_tokens > 0
    assert finished.timings.ttft_s <= finished.timings.total_s


def test_messages_are_answered_through_the_template(ready: Subject) -> None:
    request = Request(
        id="chat",
        model=ready.source.name,
        messages=(Message("user", "Turn on the lamp."),),
        max_tokens=8,
        sampling=GREEDY,
    )
    assert 0 < len(finish(ready.world.generate(request)).token_ids) <= 8


def test_greedy_answers_repeat_token_for_token(ready: Subject) -> None:
    assert finish(ask(ready)).token_ids == finish(ask(ready)).token_ids


def test_a_seed_repeats_a_sampled_answer(ready: Subject) -> None:
    warm = Sampling(temperature=1.0, seed=7)
    assert finish(ask(ready, sampling=warm)).token_ids == finish(ask(ready, sampling=warm)).token_ids


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(ready: Subject) -> None:
    whole = finish(ask(ready, max_tokens=24)).text
    stop = next(c for c in whole[4:] if c not in whole[:4])
    finished = finish(ask(ready, max_tokens=24, stop=(stop,)))
    assert finished.finish_reason == FinishReason.STOP
    assert finished.text == whole[: whole.index(stop)]


def test_token_ids_are_answered_as_they_are(ready: Subject) -> None:
    request = Request(
        id="ids", model=ready.source.name, token_ids=(72, 105), max_tokens=4, ignore_eos=True, sampling=GREEDY
    )
    finished = finish(ready.world.generate(request))
    assert finished.timings.prompt_tokens == 2
    assert len(finished.token_ids) == 4


def test_an_unknown_model_is_refused_by_name(ready: Subject) -> None:
    with pytest.raises(ModelNotFound, match="nobody"):
        finish(ask(ready, model="nobody"))


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(ready: Subject) -> None:
    context = ready.world.status().models[0].info.context_tokens
    request = Request(id="long", model=ready.source.name, token_ids=(65,) * (context + 1), max_tokens=1)
    with pytest.raises(ContextOverflow) as caught:
        finish(ready.world.generate(request))
    assert str(context) in caught.value.message
    assert str(context + 1) in caught.value.message
    assert finish(ask(ready)).finish_reason == FinishReason.LENGTH


def test_a_prompt_that_leaves_no_room_for_the_answer_is_refused(ready: Subject) -> None:
    context = ready.world.status().models[0].info.context_tokens
    request = Request(id="room", model=ready.source.name, token_ids=(65,) * 8, max_tokens=context)
    with pytest.raises(ContextOverflow):
        finish(ready.world.generate(request))


def test_an_error_message_never_repeats_the_prompt(ready: Subject) -> None:
    context = ready.world.status().models[0].info.context_tokens
    with pytest.raises(ContextOverflow) as caught:
        finish(ask(ready, "canary-7351 " * context))
    assert "canary" not in caught.value.message + caught.value.hint


# Several at once


def test_concurrent_requests_are_queued_and_all_finish(ready: Subject) -> None:
    alone = finish(ask(ready)).token_ids
    answers: list[Finished] = []
    errors: list[BaseException] = []

    def one() -> None:
        try:
            answers.append(finish(ask(ready)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert [a.token_ids for a in answers] == [alone] * 6


def test_status_counts_what_was_answered_and_what_is_active(ready: Subject) -> None:
    first, second = long_answer(ready), long_answer(ready)
    next(first)
    status = ready.world.status()
    assert status.active_requests >= 1
    assert status.active_requests + status.waiting_requests == 2
    first.cancel()
    second.cancel()
    finish_rest(first)
    finish_rest(second)
    finish(ask(ready))
    after = ready.world.status()
    (model,) = after.models
    assert model.requests >= 1
    assert model.last_used_s_ago is not None
    assert model.last_used_s_ago >= 0
    assert 0 < model.resident_bytes <= model.info.weight_bytes * 1.1 + (4 << 20)
    assert after.uptime_s >= 0
    assert after.pid > 0


def finish_rest(generation: Generation) -> Finished:
    """The last event of an answer whose first events are gone."""
    *_, last = generation
    assert isinstance(last, Finished)
    return last


# Cancelling


def test_a_cancelled_answer_ends_soon_and_says_so(ready: Subject) -> None:
    generation = long_answer(ready)
    next(generation)
    generation.cancel()
    generation.cancel()
    finished = finish_rest(generation)
    assert finished.finish_reason == FinishReason.CANCELLED
    assert 1 <= len(finished.token_ids) < 400
    generation.cancel()
    assert finish(ask(ready)).finish_reason == FinishReason.LENGTH


def test_a_waiting_request_can_be_cancelled_before_it_starts(ready: Subject) -> None:
    running, waiting = long_answer(ready), long_answer(ready)
    next(running)
    waiting.cancel()
    running.cancel()
    assert finish_rest(running).finish_reason == FinishReason.CANCELLED
    assert finish_rest(waiting).finish_reason == FinishReason.CANCELLED


def test_cancelling_from_another_thread_wakes_the_reader(ready: Subject) -> None:
    generation = long_answer(ready)
    next(generation)
    thread = threading.Thread(target=generation.cancel)
    thread.start()
    assert finish_rest(generation).finish_reason == FinishReason.CANCELLED
    thread.join()


# Recall


def test_a_recall_gives_bytes_back_and_status_agrees(ready: Subject) -> None:
    finish(ask(ready))
    before = ready.world.status().models[0].resident_bytes
    recalling = ready.world.recall(before)
    assert 0 <= recalling.later_bytes <= recalling.chosen_bytes <= recalling.asked_bytes == before
    done = recalling.wait(60)
    assert 0 < done.freed_bytes <= recalling.chosen_bytes
    assert recalling.answered_s >= 0
    assert 0 <= done.first_byte_s <= done.done_s
    assert recalling.wait(0) == done
    assert ready.world.status().models[0].resident_bytes <= before - done.freed_bytes
    assert ready.world.recall(0).wait(60).freed_bytes == 0


def test_a_recall_between_answers_never_changes_an_answer(ready: Subject) -> None:
    undisturbed = finish(ask(ready)).token_ids
    ready.world.recall(1 << 40).wait(60)
    assert finish(ask(ready)).token_ids == undisturbed


def test_a_recall_during_an_answer_never_changes_it(ready: Subject) -> None:
    undisturbed = finish(ask(ready, max_tokens=60)).token_ids
    generation = ask(ready, max_tokens=60)
    tokens: list[Token] = []
    for event in generation:
        if isinstance(event, Finished):
            check(tokens, event)
            assert event.token_ids == undisturbed
            break
        tokens.append(event)
        if len(tokens) % 10 == 1:
            ready.world.recall(1 << 40).wait(60)
    else:
        raise AssertionError("no end")


# Budget, offers, trace


def test_a_recall_lowers_the_budget_and_an_offer_raises_it_up_to_the_cap(ready: Subject) -> None:
    finish(ask(ready))
    start = ready.world.budget()
    assert start.floor_bytes <= start.soft_bytes <= start.hard_bytes
    assert start.held_bytes > 0
    freed = ready.world.recall(1 << 40).wait(60).freed_bytes
    assert freed > 0
    lowered = ready.world.budget()
    assert start.floor_bytes <= lowered.soft_bytes <= max(start.held_bytes - freed, start.floor_bytes)
    ready.world.offer(1 << 20)
    assert ready.world.budget().soft_bytes == lowered.soft_bytes + (1 << 20)
    ready.world.offer(1 << 50)
    assert ready.world.budget().soft_bytes == start.hard_bytes


def test_limits_are_set_one_by_one_and_stay_in_order(ready: Subject) -> None:
    before = ready.world.budget()
    raised = ready.world.budget(floor_bytes=before.soft_bytes + 4096)
    assert (raised.soft_bytes, raised.floor_bytes) == (before.soft_bytes + 4096, before.soft_bytes + 4096)
    assert raised.hard_bytes == before.hard_bytes
    capped = ready.world.budget(hard_bytes=3 << 20, floor_bytes=0)
    assert (capped.soft_bytes, capped.hard_bytes, capped.floor_bytes) == (3 << 20, 3 << 20, 0)
    assert ready.world.budget(soft_bytes=2 << 20).soft_bytes == 2 << 20
    status = ready.world.status().budget
    assert status is not None
    assert status.soft_bytes == 2 << 20


@pytest.mark.parametrize(
    "call",
    [
        lambda world: world.recall(-1),
        lambda world: world.offer(-1),
        lambda world: world.budget(soft_bytes=-1),
        lambda world: world.budget(floor_bytes=2, hard_bytes=1),
    ],
    ids=["recall", "offer", "budget", "floor above cap"],
)
def test_sizes_that_make_no_sense_are_refused_and_change_nothing(
    ready: Subject, call: Callable[[World], object]
) -> None:
    before = ready.world.budget()
    with pytest.raises(InvalidRequest):
        call(ready.world)
    assert ready.world.budget() == before


def test_an_answer_within_a_small_budget_is_the_same(ready: Subject) -> None:
    undisturbed = finish(ask(ready, max_tokens=60)).token_ids
    ready.world.budget(soft_bytes=3 << 20)
    assert finish(ask(ready, max_tokens=60)).token_ids == undisturbed
    budget = ready.world.budget()
    assert budget.held_bytes <= budget.soft_bytes + (4 << 20)  # a segment for each loader


def test_the_trace_has_every_recall_and_can_be_continued(ready: Subject) -> None:
    ready.world.recall(4096).wait(60)
    lines = [json.loads(line) for line in ready.world.trace()]
    assert [line["n"] for line in lines] == sorted(line["n"] for line in lines)
    (recall,) = [line for line in lines if line.get("event", {}).get("type") == "PressureRecall"]
    assert recall["event"]["nbytes"] == 4096
    last = lines[-1]["n"]
    assert ready.world.trace(last) == []
    ready.world.offer(1)
    ready.world.budget()
    assert all(json.loads(line)["n"] > last for line in ready.world.trace(last))
    assert ready.world.trace(last)


# Crashes and the end


def outcome(generation: Generation) -> Finished | FlexServeError:
    """The end of an answer, whichever it is."""
    try:
        return finish_rest(generation)
    except FlexServeError as error:
        return error


def test_a_crash_gives_one_clear_error_and_the_next_request_works(ready: Subject) -> None:
    undisturbed = finish(ask(ready)).token_ids
    generation = long_answer(ready)
    next(generation)
    ready.crash()
    error = outcome(generation)
    assert isinstance(error, WorldCrashed)
    assert error.message
    assert error.hint
    assert list(generation) == [], "nothing follows the error"
    assert finish(ask(ready)).token_ids == undisturbed
    status = ready.world.status()
    assert status.restarts == 1
    assert [m.info.name for m in status.models] == [ready.source.name]


def test_a_crash_loses_no_waiting_request(ready: Subject) -> None:
    running, waiting = long_answer(ready), ask(ready)
    next(running)
    ready.crash()
    assert isinstance(outcome(running), WorldCrashed)
    end = outcome(waiting)
    assert isinstance(end, WorldCrashed) or (
        isinstance(end, Finished) and end.finish_reason == FinishReason.LENGTH
    )


def test_closing_ends_answers_in_flight_with_an_error(ready: Subject) -> None:
    running, waiting = long_answer(ready), long_answer(ready)
    next(running)
    ready.world.close()
    assert isinstance(outcome(running), WorldCrashed)
    assert isinstance(outcome(waiting), WorldCrashed)
    ready.world.close()


Call = Callable[[World, ModelSource], object]


@pytest.mark.parametrize(
    "call",
    [
        lambda world, source: world.register(source),
        lambda world, source: world.generate(Request(id="x", model=source.name, prompt="x")),
        lambda world, source: world.recall(1),
        lambda world, source: world.status(),
    ],
    ids=["register", "generate", "recall", "status"],
)
def test_a_closed_world_refuses_every_call(
    ready: Subject, call: Callable[[World, ModelSource], object]
) -> None:
    ready.world.close()
    with pytest.raises(EngineFailure):
        call(ready.world, ready.source)


def test_what_is_asked_in_a_row_is_known_and_can_be_forgotten(subject: Subject) -> None:
    world, name = subject.world, subject.source.name
    world.register(subject.source)
    for client in (None, "planner"):
        for _ in range(3):
            finish(
                world.generate(
                    Request(id=f"test-{next(_ids)}", model=name, prompt="Hi.", max_tokens=2, client=client)
                )
            )
    found = [w for w in world.workflows().workflows if (w.steps, w.next_model) == ((name,), name)]
    assert [w.seen for w in found] == [2, 2]
    assert len({w.client for w in found}) == 2
    world.declare_workflow("planner", "trip", [name, name])
    assert "trip" in {w.declared for w in world.workflows().workflows}
    with pytest.raises(InvalidRequest, match="steps"):
        world.declare_workflow(None, "trip", [name])
    with pytest.raises(InvalidRequest, match="name"):
        world.declare_workflow(None, "what I asked", [name, name])
    with pytest.raises(NotFound):
        world.forget_workflows(workflow="absent")
    assert world.forget_workflows("planner") == 1
    assert world.forget_workflows(anonymous=True) == 1
    assert world.workflows().workflows == ()
