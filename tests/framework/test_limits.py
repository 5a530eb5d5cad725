"""Stories about limits that are set while it runs, and about sessions without a storage or beyond their share."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexserve.framework import effects as ef
from flexserve.framework import events as ev
from flexserve.framework.effects import Why
from flexserve.framework.tables import Impossible

from .executor import Answer
from .test_stories import BODY, KV, MIB, SETTINGS, answer, effects, resident, world


def test_limits_move_the_budget_between_them() -> None:
    made = world(models="a")
    answer(made, "r", "a")
    made.post(ev.BudgetSet(cap_bytes=60 * MIB))
    made.drain()
    made.check()
    assert made.framework.view().budget == 60 * MIB
    made.post(ev.Offer(500 * MIB))
    assert made.framework.view().budget == 60 * MIB
    made.post(ev.BudgetSet(cap_bytes=200 * MIB, floor_bytes=80 * MIB))
    view = made.framework.view()
    assert (view.budget, view.floor, view.cap) == (80 * MIB, 80 * MIB, 200 * MIB)
    made.post(ev.PressureRecall(1, 1000 * MIB))
    assert made.framework.view().budget == 80 * MIB
    with pytest.raises(Impossible):
        made.post(ev.BudgetSet(floor_bytes=300 * MIB))


def test_without_a_storage_idle_kv_is_given_up_and_nothing_is_saved() -> None:
    made = world(replace(SETTINGS, saves=False, floor_bytes=0), models="a")
    answer(made, "r", "a")
    made.now += 100
    made.post(ev.Tick())
    made.post(ev.PressureRecall(1, 1000 * MIB))
    made.drain()
    made.check()
    assert not effects(made, ef.SaveSession)
    assert made.framework.view().held == 0
    assert resident(made) == {"a": 0}


def test_idle_sessions_beyond_their_share_are_saved_and_dropped() -> None:
    made = world(replace(SETTINGS, session_limit_bytes=250_000), models="a")
    for number in range(4):
        answer(made, f"r{number}", "a")
    made.drain()
    view = made.framework.view()
    assert view.models[0].session_bytes <= 250_000
    assert view.sessions_stored >= 1
    dropped = [d.effect.session for d in effects(made, ef.DropSession)]
    assert dropped[0] == "a/r0", "the longest idle one goes first"


def test_there_are_never_more_sessions_than_there_may_be() -> None:
    made = world(replace(SETTINGS, session_limit=3), models="a")
    for number in range(8):
        answer(made, f"r{number}", "a")
        made.post(ev.Tick())
        made.drain()
    for _ in range(4):
        made.post(ev.Tick())
        made.drain()
    view = made.framework.view()
    assert view.models[0].sessions + view.sessions_stored <= 3
    made.check()


def test_a_model_that_is_registered_again_finds_its_saved_sessions() -> None:
    made = world(models="a")
    answer(made, "r", "a")
    made.post(ev.ModelRemoved("a"))
    made.drain()
    assert "a" not in made.images
    assert made.framework.view().sessions_stored == 0, "nobody's, until somebody says whose"
    assert not effects(made, ef.ForgetSession), "its files stay"
    made.register("a", made.log[0][1].parts, 1000)  # type: ignore[union-attr]
    made.post(ev.SessionFound("a/again", "a", 100))
    assert made.framework.view().sessions_stored == 1


def test_an_adapter_counts_and_no_recall_takes_it() -> None:
    made = world(models="")
    made.register("a", BODY, KV, fixed=30 * MIB)
    assert made.framework.view().held == 30 * MIB
    answer(made, "r", "a")
    made.post(ev.PressureRecall(1, 1000 * MIB))
    made.drain()
    view = made.framework.view()
    assert (view.budget, view.held, view.fixed) == (30 * MIB, 30 * MIB, 30 * MIB)
    made.post(ev.BudgetSet(5 * MIB))
    assert made.framework.view().budget == 30 * MIB
    made.post(ev.ModelRemoved("a"))
    made.drain()
    made.check()
    assert made.framework.view().held == 0


def test_beside_an_adapter_a_model_has_what_it_leaves() -> None:
    made = world(replace(SETTINGS, budget_bytes=80 * MIB), models="")
    made.register("a", BODY, KV, fixed=30 * MIB)
    made.ask("r", Answer("a", "a/s", 100))
    made.drain()
    view = made.framework.view()
    assert view.held <= 80 * MIB
    assert view.models[0].streamed > 50 * MIB
    assert made.answers["r"].state == "computing"


def test_an_answer_without_a_window_stops_says_what_it_wants_and_goes_on_with_it() -> None:
    made = world(replace(SETTINGS, floor_bytes=0), models="a")
    made.ask("r", Answer("a", "a/s", 100))
    made.drain()
    made.step("r")
    made.post(ev.PressureRecall(1, 95 * MIB))
    made.drain()
    made.check()
    (stopped,) = effects(made, ef.SuspendRequest)
    assert stopped.why == Why.NOT_ENOUGH
    view = made.framework.view()
    window = SETTINGS.stream_window_bytes
    assert view.budget < window
    assert view.wanted >= window - view.budget
    assert made.asked[-1] == view.wanted
    made.post(ev.Offer(view.wanted))
    made.drain()
    assert made.answers["r"].state == "computing"
    made.finish("r")
    made.drain()
    assert made.answers["r"].ended == "finished"
    assert made.framework.view().wanted == 0


@pytest.mark.parametrize("comes", [True, False])
def test_without_a_storage_its_kv_waits_in_memory_and_it_ends_with_an_error_if_nothing_comes(
    comes: bool,
) -> None:
    made = world(replace(SETTINGS, floor_bytes=0, saves=False), models="a")
    made.ask("r", Answer("a", "a/s", 100))
    made.drain()
    made.post(ev.PressureRecall(1, 1000 * MIB))
    made.drain()
    assert made.answers["r"].state == "suspended"
    assert not effects(made, ef.SaveSession)
    assert made.framework.view().held == 256 * KV  # what it was granted
    if comes:
        made.post(ev.Offer(100 * MIB))
        made.drain()
        assert made.answers["r"].state == "computing"
        made.finish("r")
    else:
        made.now += SETTINGS.suspend_limit_s
        made.post(ev.Tick())
    made.drain()
    assert made.answers["r"].ended == ("finished" if comes else "out_of_budget")
    made.post(ev.PressureRecall(2, 1000 * MIB))
    made.drain()
    assert made.framework.view().held == 0


def test_a_recall_is_over_when_its_sessions_are_back_whatever_weights_come_and_go() -> None:
    made = world(replace(SETTINGS, floor_bytes=0), models="a")
    answer(made, "r", "a", session="a/s")
    made.post(ev.PressureRecall(7, 1000 * MIB))
    made.run("arena a")
    for index in range(100):  # more than the session: compute brings weights back, and they are taken again
        made.place("a", index)
        made.run("arena a")
    assert not effects(made, ef.FinishRecall)
    made.drain()
    (finished,) = effects(made, ef.FinishRecall)
    assert finished.why == Why.GIVEN_BACK


# A window is whole segments


def test_with_room_for_a_part_of_a_segment_an_answer_waits_and_does_not_crawl() -> None:
    half = MIB // 2
    limits = replace(
        SETTINGS, floor_bytes=0, budget_bytes=256 * KV + half, stream_window_bytes=half, stream_behind_bytes=0
    )
    made = world(limits, models="a")
    made.ask("r", Answer("a", "a/s", 100))
    made.drain()
    assert made.answers["r"].state != "computing"
    assert made.asked[-1] >= half, "at least what is missing to one whole segment"
    assert made.framework.view().models[0].least == 256 * KV + MIB
    made.post(ev.Offer(half))
    made.drain()
    made.check()
    assert made.answers["r"].state == "computing"
    assert made.framework.view().models[0].streamed == 100 * MIB


def test_the_least_budget_is_a_window_the_first_keys_and_values_and_every_adapter() -> None:
    made = world(SETTINGS, models="a")
    made.register("b", BODY, KV, fixed=3 * MIB)
    window = SETTINGS.stream_window_bytes
    assert [m.least for m in made.framework.view().models] == [window + 256 * KV + 3 * MIB] * 2


def test_a_request_that_no_offer_could_serve_is_refused_at_once() -> None:
    made = world(replace(SETTINGS, floor_bytes=0, budget_bytes=8 * MIB, cap_bytes=8 * MIB), models="a")
    made.ask("r", Answer("a", "a/s", 100))
    made.drain()
    (refused,) = effects(made, ef.Reject)
    assert refused.effect.code == made.answers["r"].ended == "out_of_budget"
    assert "no offer lifts the memory budget above" in refused.effect.message
    assert made.now < SETTINGS.suspend_limit_s
    assert not made.framework.view().active


def test_the_kernel_is_not_handed_a_pinned_model() -> None:
    made = world(replace(SETTINGS, lazy=True, pinned=("a",)), models="ab")
    for name in "ab":
        answer(made, f"r{name}", name)
    made.now += SETTINGS.lazy_after_s
    made.post(ev.Tick())
    assert {handed.effect.model for handed in effects(made, ef.HandLazily)} == {"b"}
    assert [m.pinned for m in made.framework.view().models] == [True, False]
