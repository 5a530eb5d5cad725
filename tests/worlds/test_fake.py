"""What only the fake world and engine do. What they share with every world: tests/contract."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexserve.core import Event, Finished, FinishReason, Request, Token
from flexserve.engine.fake import FakeEngine, Script, SystemClock, VirtualClock
from flexserve.errors import Busy, EngineFailure, InvalidRequest, SegmentNotAuthentic, Usage
from flexserve.worlds import WORLD_NAMES, WorldOptions, make_world
from flexserve.worlds.fake import FakeWorld, write_fake_model


def answer(engine: FakeEngine, request: Request, wake: threading.Event | None = None) -> list[Event]:
    return list(
        engine.answer(
            request, context_tokens=256, wake=wake or threading.Event(), accepted_s=engine.clock.now()
        )
    )


def ask(prompt: str = "hello", **fields: object) -> Request:
    return Request(id="r", model="m", prompt=prompt, **fields)  # type: ignore[arg-type]


def finished(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def test_without_a_script_it_echoes_and_with_one_it_follows_it() -> None:
    engine = FakeEngine({"ping": Script("pong")})
    assert finished(answer(engine, ask("hello"))).text == "hello"
    assert finished(answer(engine, ask("ping"))).text == "pong"


def test_scripted_time_passes_on_the_virtual_clock_only() -> None:
    engine = FakeEngine(prefill_s=3600, token_s=60)
    timings = finished(answer(engine, ask("hello"))).timings
    assert timings.ttft_s == timings.prefill_s == 3600
    assert timings.decode_s == 4 * 60
    assert timings.total_s == 3840
    assert timings.decode_tokens_per_s == pytest.approx(1 / 60)


def test_a_scripted_error_ends_the_answer_after_its_text() -> None:
    engine = FakeEngine({"x": Script("ab", EngineFailure("scripted"))})
    events = engine.answer(ask("x"), context_tokens=256, wake=threading.Event(), accepted_s=0)
    assert [next(events), next(events)] == [Token(ord("a"), "a"), Token(ord("b"), "b")]
    with pytest.raises(EngineFailure, match="scripted"):
        next(events)


def test_waking_cancels_at_the_next_token_even_in_real_time() -> None:
    wake = threading.Event()
    engine = FakeEngine(clock=SystemClock(), token_s=3600)
    events = engine.answer(ask("hello"), context_tokens=256, wake=wake, accepted_s=0)
    assert next(events) == Token(ord("h"), "h")
    wake.set()
    *_, last = events
    assert isinstance(last, Finished)
    assert last.finish_reason == FinishReason.CANCELLED


def test_ids_beyond_a_byte_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="vocabulary size 256"):
        answer(FakeEngine(), Request(id="r", model="m", token_ids=(256,)))


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_pieces_make_the_text_up_to_the_earliest_stop_string(text: str, stop: list[str]) -> None:
    events = answer(FakeEngine({"p": Script(text)}), ask("p", stop=tuple(stop)))
    end = finished(events)
    expected = text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]
    first_complete = min((at + len(s) for s in stop if (at := text.find(s)) >= 0), default=None)
    if first_complete is None:
        assert end.text == text
    else:
        assert text.startswith(end.text)
        assert len(end.text) <= first_complete
        assert not any(s in end.text for s in stop)
        assert len(end.text) >= len(expected)
    assert end.text.startswith("".join(e.text for e in events if isinstance(e, Token)))
    assert bytes(end.token_ids) == text.encode()[: len(end.token_ids)]


def test_more_than_it_lets_wait_is_busy(tmp_path: Path) -> None:
    world = FakeWorld(FakeEngine(clock=SystemClock(), token_s=3600), max_waiting=2)
    world.start()
    world.register(write_fake_model(tmp_path, "m"))
    first = world.generate(ask())
    next(first)
    waiting = [world.generate(ask()), world.generate(ask())]
    with pytest.raises(Busy, match="2 requests"):
        world.generate(ask())
    assert world.in_flight() == [first, *waiting]
    world.close()


def test_a_poisoned_model_answers_nothing_and_says_so(tmp_path: Path) -> None:
    world = FakeWorld()
    world.start()
    world.register(write_fake_model(tmp_path, "m"))
    world.poison("m")
    with pytest.raises(SegmentNotAuthentic):
        next(world.generate(ask()))
    assert world.status().models[0].poisoned
    world.close()


def test_a_cold_answer_loads_the_weights_and_a_recall_makes_it_cold_again(tmp_path: Path) -> None:
    world = FakeWorld()
    world.start()
    world.register(write_fake_model(tmp_path, "m", weight_bytes=1000))
    loads = [finished(list(world.generate(ask()))).timings.load_bytes for _ in range(2)]
    assert world.recall(400).wait().freed_bytes == 400
    loads.append(finished(list(world.generate(ask()))).timings.load_bytes)
    assert loads == [1000, 0, 400]
    world.close()


def test_a_world_that_was_not_started_refuses(tmp_path: Path) -> None:
    with pytest.raises(EngineFailure, match="not started"):
        FakeWorld().register(write_fake_model(tmp_path, "m"))


def test_a_virtual_clock_moves_only_when_told() -> None:
    clock = VirtualClock()
    assert clock.now() == 0
    clock.sleep(5, threading.Event())
    assert clock.now() == 5


def test_worlds_are_made_by_name() -> None:
    assert make_world("fake", WorldOptions()).name == "fake"
    with pytest.raises(Usage, match="device key"):
        make_world("linux", WorldOptions())
    with pytest.raises(Usage, match="no world is called 'moon'"):
        make_world("moon", WorldOptions())
    assert WORLD_NAMES == ("linux", "fake")
