"""Small stories about the Framework's decisions, with a world that carries them out at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flexserve.errors import Usage
from flexserve.framework import effects as ef
from flexserve.framework import events as ev
from flexserve.framework.effects import Why
from flexserve.framework.machine import Framework
from flexserve.framework.order import Range
from flexserve.framework.settings import Settings
from flexserve.framework.tables import Impossible
from flexserve.framework.tables import SegmentTrigger as Seg
from flexserve.framework.weights import Part

from .executor import LOADERS, Answer, Executor

MIB = 1 << 20
KV = 1000  # bytes per token
BODY = (Part(0, 100, MIB, 100 * MIB),)
SETTINGS = Settings(
    budget_bytes=350 * MIB, cap_bytes=1000 * MIB, floor_bytes=10 * MIB, stream_window_bytes=8 * MIB,
    stream_behind_bytes=2 * MIB, lazy=False,
)  # fmt: skip


def world(settings: Settings = SETTINGS, models: str = "abc") -> Executor:
    made = Executor(settings)
    for name in models:
        made.register(name, BODY, KV)
    return made


def answer(made: Executor, name: str, model: str, *, prompt: int = 100, session: str = "") -> None:
    """One request from arrival to end, with all it sets in motion."""
    made.ask(name, Answer(model, session or f"{model}/{name}", prompt))
    made.drain()
    made.step(name)
    made.finish(name)
    made.drain()
    made.check()


def effects(made: Executor, kind: type, since: int = 0) -> list[Any]:
    return [d for _, _, ds in made.log[since:] for d in ds if isinstance(d.effect, kind)]


def resident(made: Executor) -> dict[str, int]:
    return {n: i.resident // MIB for n, i in made.images.items()}


# Two at a time


def test_kv_that_another_request_is_changing_is_not_read() -> None:
    made = world(replace(SETTINGS, compute_slots=2), models="a")
    made.ask("r1", Answer("a", "a/one", 100))
    made.drain()
    made.ask("r2", Answer("a", "a/two", 120, source="a/one", matched=100))
    made.drain()
    assert made.answers["r2"].state == "computing"
    made.finish("r1", keep=False)
    made.drain()
    made.finish("r2")
    made.drain()
    made.check()
    (started,) = [d.effect for d in effects(made, ef.ComputePrompt) if d.effect.request == "r2"]
    assert (started.source, started.reuse_tokens) == (None, 0)


# Models that go


def test_a_model_that_is_being_closed_is_handed_over_no_more() -> None:
    made = world(replace(SETTINGS, lazy=True), models="a")
    made.ask("r1", Answer("a", "a/r1", 100))
    made.drain()
    made.finish("r1", keep=False)
    made.drain()
    made.post(ev.ModelRemoved("a"))
    made.now += SETTINGS.lazy_after_s + 1
    made.post(ev.Tick())  # before it is closed
    assert list(made.queues) == ["arena a"]
    made.drain()
    assert made.images == {}


# Recall


def test_a_recall_takes_the_least_invoked_models_tail_first() -> None:
    made = world()
    for count, model in enumerate("cab"):  # b is invoked most, then a, then c
        for turn in range(count + 1):
            answer(made, f"{model}{turn}", model)
    made.post(ev.BudgetSet(SETTINGS.cap_bytes))
    made.drain()
    made.post(ev.BudgetSet(340 * MIB))
    saved = sum(kv.nbytes for kv in made.kvs.values() if kv.memory and kv.stored == kv.memory)
    since = len(made.log)
    made.post(ev.PressureRecall(1, saved + 110 * MIB))
    chosen = [d.effect for d in effects(made, ef.Recall, since)]
    assert chosen == [ef.Recall("c", (Range(0, 100),)), ef.Recall("a", (Range(90, 10),))]
    made.drain()
    assert resident(made) == {"a": 90, "b": 100, "c": 0}


def test_saved_sessions_go_before_weights_and_unsaved_ones_after() -> None:
    made = world(models="a")
    answer(made, "r1", "a", session="a/old")
    made.now += 20.0
    made.post(ev.Tick())
    made.drain()  # saved early
    answer(made, "r2", "a", session="a/new")
    since = len(made.log)
    made.post(ev.PressureRecall(1, 340 * MIB))
    kinds = [type(d.effect).__name__ for d in made.log[-1][2] if d.effect is not None]
    assert kinds == ["DropSession", "Recall", "AnswerRecall"]  # the floor keeps the rest
    assert effects(made, ef.Recall, since)[0].why == Why.LEAST_INVOKED
    made.drain()
    made.post(ev.BudgetSet(10 * MIB))
    made.drain()
    assert made.kvs["a/new"].memory is not None  # not needed: the weights were enough
    assert made.framework.view().held <= 10 * MIB


def test_a_recall_is_answered_when_bytes_are_chosen_and_finished_when_they_are_back() -> None:
    made = world(models="a")
    answer(made, "r1", "a")
    since = len(made.log)
    made.post(ev.PressureRecall(7, 40 * MIB))
    (answered,) = effects(made, ef.AnswerRecall, since)
    assert answered.effect == ef.AnswerRecall(7, 40 * MIB, 0)
    assert not effects(made, ef.FinishRecall, since)
    made.drain()
    assert effects(made, ef.FinishRecall, since)[0].effect == ef.FinishRecall(7, 40 * MIB)


def test_no_recall_goes_below_the_floor() -> None:
    made = world(models="a")
    answer(made, "r1", "a")
    made.post(ev.PressureRecall(1, 10_000 * MIB))
    made.drain()
    view = made.framework.view()
    assert view.budget == SETTINGS.floor_bytes
    assert SETTINGS.floor_bytes - MIB <= view.held <= SETTINGS.floor_bytes


def test_unsaved_idle_kv_is_saved_before_it_goes() -> None:
    made = world(replace(SETTINGS, floor_bytes=0), models="a")
    answer(made, "r1", "a", prompt=3000)
    since = len(made.log)
    made.post(ev.PressureRecall(1, 1000 * MIB))
    made.drain()
    (answered,) = effects(made, ef.AnswerRecall, since)
    assert isinstance(answered.effect, ef.AnswerRecall) and answered.effect.later_bytes == 3000 * KV + KV
    assert made.framework.view().held == 0
    assert made.kvs["a/r1"].stored is not None and made.kvs["a/r1"].memory is None


def test_a_session_that_goes_once_it_is_saved_is_read_again_before_a_prompt_goes_on_from_it() -> None:
    made = world(replace(SETTINGS, floor_bytes=0), models="a")
    answer(made, "r1", "a")
    made.post(ev.PressureRecall(1, 1000 * MIB))
    made.run("kv a/r1")  # the save has begun
    made.post(ev.BudgetSet(200 * MIB))
    made.ask("r2", Answer("a", "a/r2", 300, source="a/r1", matched=64))
    made.run("request r2")
    assert not effects(made, ef.ComputePrompt)[1:]  # it would be dropped before anybody reads it
    made.drain()
    made.check()
    (restored,) = effects(made, ef.RestoreSession)
    assert restored.effect == ef.RestoreSession("a/r1")
    computed = effects(made, ef.ComputePrompt)[-1].effect
    assert isinstance(computed, ef.ComputePrompt)
    assert (computed.source, computed.reuse_tokens) == ("a/r1", 64)


def test_past_its_deadline_a_recall_gives_up_idle_kv_that_is_not_saved() -> None:
    made = world(replace(SETTINGS, floor_bytes=0), models="a")
    answer(made, "r1", "a")
    made.post(ev.PressureRecall(1, 1000 * MIB, deadline_s=0.5))
    made.run("kv a/r1")  # the save has begun, and hangs
    made.now += 1.0
    made.post(ev.Tick())
    assert [d.why for d in effects(made, ef.DropSession)] == [Why.DEADLINE]


def test_kv_of_an_open_request_is_saved_and_the_request_goes_on_when_memory_comes_back() -> None:
    made = world(replace(SETTINGS, floor_bytes=0), models="a")
    made.ask("r1", Answer("a", "a/s", 3000))
    made.drain()
    made.step("r1")
    made.post(ev.PressureRecall(1, 1000 * MIB))
    made.drain()
    assert made.answers["r1"].state == "suspended"
    assert made.framework.view().held == 0
    made.post(ev.Offer(350 * MIB))
    made.drain()
    assert made.answers["r1"].state == "computing"
    made.finish("r1")
    made.drain()
    assert made.answers["r1"].ended == "finished"


def test_a_request_that_never_gets_its_memory_back_ends_with_one_clear_error() -> None:
    made = world(replace(SETTINGS, floor_bytes=0), models="a")
    made.ask("r1", Answer("a", "a/s", 3000))
    made.drain()
    made.post(ev.PressureRecall(1, 1000 * MIB))
    made.drain()
    made.now += SETTINGS.suspend_limit_s
    made.post(ev.Tick())
    assert made.answers["r1"].ended == "out_of_budget"


# Loading


def test_a_model_that_fits_is_asked_for_as_a_whole_in_execution_order() -> None:
    made = world(models="a")
    made.ask("r1", Answer("a", "a/s", 10))
    asked = [d.effect for d in effects(made, ef.LoadRange)]
    assert asked == [ef.LoadRange("a", (Range(0, 100),), ef.Priority.REQUEST)]


def test_the_rows_of_the_prompt_come_first() -> None:
    made = Executor(SETTINGS)
    made.register("a", (Part(0, 50, 1000, 50_000, fill=False), Part(50, 10, MIB, 10 * MIB)), KV)
    made.ask("r1", Answer("a", "a/s", 10, rows=(Range(7, 2), Range(20, 1))))
    made.drain()
    (rows,) = [d.effect for d in effects(made, ef.LoadRange) if d.why == Why.PROMPT_ROWS]
    assert rows == ef.LoadRange("a", (Range(7, 2), Range(20, 1)), ef.Priority.ROWS)
    assert sum(i < 50 for i in made.images["a"].state) == 3  # never the whole embedding


def test_the_rows_of_a_tied_embedding_come_first_though_all_of_the_model_is_asked_for_before() -> None:
    made = Executor(SETTINGS)
    made.register("a", (Part(50, 10, MIB, 10 * MIB), Part(0, 50, 1000, 50_000)), KV)
    made.ask("r1", Answer("a", "a/s", 10, rows=(Range(7, 2), Range(20, 1))))
    made.drain()
    asked = [d.effect for d in effects(made, ef.LoadRange)]
    assert [one.priority for one in asked] == [ef.Priority.REQUEST, ef.Priority.ROWS]
    assert asked[1].ranges == (Range(7, 2), Range(20, 1))
    changed = [e for _, e, _ in made.log if isinstance(e, ev.SegmentsChanged)]
    placed = [e.ranges[0].first for e in changed if e.what == Seg.PLACED]
    assert {7, 8, 20} < set(placed[: 3 + LOADERS])  # behind what the loaders had in hand
    assert sorted(placed) == list(range(60))  # each once
    made.check()


def test_below_the_budget_of_one_model_it_still_answers_and_streams_the_tail() -> None:
    made = world(replace(SETTINGS, budget_bytes=40 * MIB), models="a")
    made.ask("r1", Answer("a", "a/s", 10))
    made.drain()
    (told,) = effects(made, ef.StreamTail)
    assert isinstance(told.effect, ef.StreamTail) and told.effect.nbytes > 60 * MIB
    assert effects(made, ef.AskOffer)
    first = 100 - told.effect.nbytes // MIB
    for _ in range(3):  # three tokens
        loaded = sum(len(d.effect.ranges) for d in effects(made, ef.LoadRange))
        for index in range(100):
            made.touch("a", index)
            made.drain()
            made.check()
        made.step("r1")
        assert all(i in made.images["a"].state for i in range(first - 1)), "the earliest part stays"
        assert sum(len(d.effect.ranges) for d in effects(made, ef.LoadRange)) > loaded
    made.finish("r1")
    assert made.answers["r1"].ended == "finished"


def test_a_batch_keeps_what_it_needs_just_now_until_it_has_ended() -> None:
    made = world(replace(SETTINGS, floor_bytes=0), models="a")
    made.ask("r1", Answer("a", "a/s", 10))
    made.drain()
    made.touch("a", 50)
    made.post(ev.ComputeAt("a", 50))
    made.post(ev.PressureRecall(1, 10_000 * MIB))
    assert effects(made, ef.SuspendRequest)
    while made.queues and (key := next((k for k in made.queues if k.startswith("arena")), None)):
        made.run(key)  # the compute thread is in the middle of a batch
    assert 50 in made.images["a"].state
    assert made.images["a"].resident < 50 * MIB  # all else has gone
    assert made.recalls  # and the recall is not over
    made.check()
    made.drain()  # it comes to its stop
    assert made.images["a"].resident == 0
    assert not made.recalls
    made.check()
    made.post(ev.BudgetSet(200 * MIB))
    made.drain()
    assert made.answers["r1"].state == "computing"


def test_a_request_takes_memory_from_idle_models_and_never_from_one_that_computes() -> None:
    made = world(replace(SETTINGS, budget_bytes=150 * MIB), models="ab")
    answer(made, "r1", "a")
    since = len(made.log)
    made.ask("r2", Answer("b", "b/r2", 100))
    made.drain()
    assert {d.effect.model for d in effects(made, ef.Recall, since)} == {"a"}
    assert resident(made)["b"] == 100


# Stage 2 and the background


def test_stage_two_brings_back_the_most_invoked_models_prefix_in_calm() -> None:
    made = world(models="ab")
    for turn in range(3):
        answer(made, f"a{turn}", "a")
    answer(made, "b0", "b")
    made.post(ev.PressureRecall(1, 150 * MIB))
    made.drain()
    made.post(ev.Offer(60 * MIB))
    made.drain()
    assert not [d for d in effects(made, ef.LoadRange) if d.why == Why.BEST_DISTRIBUTION]  # not calm yet
    made.now += SETTINGS.calm_s
    made.post(ev.Tick())
    made.drain()
    assert [d for d in effects(made, ef.LoadRange) if d.why == Why.BEST_DISTRIBUTION]
    assert resident(made)["a"] == 100
    assert made.framework.view().held <= made.framework.view().budget


def test_an_idle_session_is_saved_early_and_only_then() -> None:
    made = world(models="a")
    answer(made, "r1", "a")
    assert not effects(made, ef.SaveSession)
    assert made.framework.due() == SETTINGS.save_after_s
    made.now += SETTINGS.save_after_s
    made.post(ev.Tick())
    made.drain()
    (saved,) = effects(made, ef.SaveSession)
    assert saved.why == Why.SAVE_EARLY
    assert made.framework.due() is None  # nothing is left to do: no timer runs


def test_a_save_that_a_request_overtook_does_not_count() -> None:
    made = world(models="a")
    answer(made, "r1", "a", session="a/s")
    made.now += SETTINGS.save_after_s
    made.post(ev.Tick())
    made.run("kv a/s")  # read, and about to be written
    made.ask("r2", Answer("a", "a/s", 50), explicit=True)
    made.run("request r2")  # computes on it from now on
    made.drain()
    assert any(d.why == Why.STALE for _, _, ds in made.log for d in ds)
    made.finish("r2")
    made.drain()
    made.check()


def test_a_late_report_of_an_older_save_does_not_mark_the_newer_one_as_done() -> None:
    made = world(models="a")
    answer(made, "r1", "a", session="a/s")
    for request in ("r2", "r3"):  # idle, being saved; then a request changes the KV before that is written
        made.now += SETTINGS.save_after_s
        made.post(ev.Tick())
        made.run("kv a/s")
        if request == "r2":
            made.ask(request, Answer("a", "a/s", 50), explicit=True)
            made.run("request r2")
            made.run("kv a/s")
            made.finish(request)
    made.run("storage a/s")  # the first save, reported while the second is under way
    assert made.log[-1][2][0].why == Why.STALE
    made.check()
    made.drain()
    made.check()
    assert made.kvs["a/s"].stored == made.kvs["a/s"].memory


def test_loading_that_a_recall_stopped_goes_on_when_memory_comes_back() -> None:
    made = world(models="a")
    made.ask("r1", Answer("a", "a/s", 10))
    for _ in range(60):
        made.load("a")
    made.post(ev.PressureRecall(1, 5 * MIB))
    made.drain()
    assert effects(made, ef.StopLoading)
    assert made.framework.view().held <= made.framework.view().budget
    made.post(ev.Offer(200 * MIB))
    made.drain()
    assert resident(made) == {"a": 100}


def test_idle_weights_are_handed_over_lazily_and_made_firm_for_a_request() -> None:
    made = world(replace(SETTINGS, lazy=True), models="a")
    answer(made, "r1", "a")
    made.now += SETTINGS.lazy_after_s
    made.post(ev.Tick())
    made.drain()
    assert set(made.images["a"].state.values()) == {"lazy"}
    made.lose("a", 99)
    made.ask("r2", Answer("a", "a/r2", 10))
    made.drain()
    assert effects(made, ef.Pin)
    assert set(made.images["a"].state.values()) == {"resident"} and len(made.images["a"].state) == 100


def test_lazy_pages_that_the_kernel_took_are_not_loaded_again_at_once() -> None:
    made = world(replace(SETTINGS, lazy=True), models="a")
    answer(made, "r1", "a")
    made.now += 100.0
    made.post(ev.Tick())
    made.drain()
    since = len(made.log)
    made.lose("a", 5)
    made.post(ev.Tick())
    assert not effects(made, ef.LoadRange, since)
    assert made.framework.due() == made.now + SETTINGS.calm_s


def test_a_saved_session_is_restored_and_continued() -> None:
    made = world(replace(SETTINGS, floor_bytes=0), models="a")
    answer(made, "r1", "a", session="a/s", prompt=500)
    made.post(ev.PressureRecall(1, 1000 * MIB))
    made.drain()
    made.post(ev.Offer(300 * MIB))
    made.ask("r2", Answer("a", "a/s", 600, "a/s", 501), explicit=True)
    made.drain()
    prompt = effects(made, ef.ComputePrompt)[-1].effect
    assert isinstance(prompt, ef.ComputePrompt)
    assert (prompt.source, prompt.reuse_tokens) == ("a/s", 501)


def test_a_session_that_cannot_be_restored_costs_a_recompute() -> None:
    made = world(replace(SETTINGS, floor_bytes=0), models="a")
    answer(made, "r1", "a", session="a/s", prompt=500)
    made.post(ev.PressureRecall(1, 1000 * MIB))
    made.drain()
    made.kvs["a/s"].corrupt = True
    made.post(ev.Offer(300 * MIB))
    made.ask("r2", Answer("a", "a/s", 600, "a/s", 501), explicit=True)
    made.drain()
    prompt = effects(made, ef.ComputePrompt)[-1].effect
    assert isinstance(prompt, ef.ComputePrompt)
    assert (prompt.source, prompt.reuse_tokens) == (None, 0)


# Requests


def test_requests_start_in_their_order_and_beyond_the_limit_are_told_busy() -> None:
    made = world(replace(SETTINGS, queue_limit=2), models="a")
    for number in range(4):
        made.ask(f"r{number}", Answer("a", f"a/{number}", 10))
    assert [made.answers[f"r{n}"].ended for n in range(4)] == ["", "", "", "busy"]
    started = []
    for number in range(3):
        made.drain()
        made.finish(f"r{number}")
    started = [d.effect.request for d in effects(made, ef.StartRequest)]
    assert started == ["r0", "r1", "r2"]


def test_a_poisoned_models_waiting_requests_get_its_error() -> None:
    made = world(models="a")
    made.ask("r1", Answer("a", "a/1", 10))
    made.ask("r2", Answer("a", "a/2", 10))
    made.drain()
    made.post(ev.ModelPoisoned("a", "segment_not_authentic", "segment 9 failed authentication"))
    assert made.answers["r2"].ended == "segment_not_authentic"
    assert made.answers["r1"].ended == ""  # it computes, and ends by itself
    made.finish("r1", keep=False)
    made.ask("r3", Answer("a", "a/3", 10))
    assert made.answers["r3"].ended == "segment_not_authentic"


def test_a_model_that_leaves_finishes_what_runs_and_saves_its_sessions() -> None:
    made = world(models="a")
    made.ask("r1", Answer("a", "a/1", 10))
    made.ask("r2", Answer("a", "a/2", 10))
    made.drain()
    made.post(ev.ModelRemoved("a"))
    assert made.answers["r2"].ended == "model_not_found"
    made.drain()
    assert "a" in made.images
    made.finish("r1")
    made.drain()
    assert "a" not in made.images
    assert made.kvs["a/1"].stored is not None
    assert made.framework.view().held == 0


def test_sessions_found_in_storage_can_be_continued_after_a_restart() -> None:
    made = world(models="a")
    made.post(ev.SessionFound("a/s", "a", 500))
    assert made.framework.view().sessions_stored == 1


def test_an_impossible_report_changes_nothing() -> None:
    framework = Framework(SETTINGS)
    framework.handle(0.0, ev.ModelRegistered("a", BODY, KV, 4096))
    before = framework.view()
    for event in (
        ev.SegmentsChanged("a", Seg.RECALLED, (Range(0, 1),)),
        ev.SegmentsChanged("a", Seg.LOAD, (Range(0, 1),)),
        ev.SegmentsChanged("a", Seg.PLACED, (Range(90, 11),)),
        ev.ModelRegistered("a", BODY, KV, 4096),
    ):
        with pytest.raises((Impossible, IndexError)):
            framework.handle(1.0, event)
    assert framework.view() == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget_bytes": 1, "floor_bytes": 2},
        {"budget_bytes": 9 << 30},
        {"calm_s": -1.0},
        {"rate_threshold": 25.0},
        {"compute_slots": 0},
        {"rate_window_s": 0.0},
        {"load_ahead_bytes": 0},
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(Usage, match=next(iter(wrong)).split("_")[0]):
        Settings(**wrong)  # type: ignore[arg-type]
