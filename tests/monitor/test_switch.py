"""The switch of protection, its timer and the request page: EL3's own C code, with registers played, and the model."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexserve.monitor.abi import REQUEST_ON, RequestWord, Status
from flexserve.monitor.switch import WORDS, Next, Protection, Switch

from .host_build import build

SECOND = 62_500_000
START = 10 * SECOND
WORD = st.one_of(st.sampled_from([0, REQUEST_ON]), st.integers(0, (1 << 64) - 1))


class CSwitch:
    """firmware/host/switch.c behind the model's methods. One per process: its state is global."""

    def __init__(self, code: ctypes.CDLL, seed: int) -> None:
        self._c = code
        self._c.switch_reset(ctypes.c_uint64(START), ctypes.c_uint64(SECOND), ctypes.c_uint64(seed))

    def advance(self, now: int) -> None:
        self._c.switch_time(ctypes.c_uint64(now))

    def change(self, changed: bool) -> None:
        self._c.switch_change(ctypes.c_bool(changed))

    def visit(self) -> None:
        self._c.switch_visit()

    def window(self, ticks: int) -> None:
        self._c.switch_window(ctypes.c_uint64(ticks))

    def tick(self, at_el1: bool) -> Next:
        """Raises `ValueError` when the CPU does not go on as it must: a register of the normal world changed."""
        return Next(self._c.switch_tick(ctypes.c_bool(at_el1)))

    def freeze(self) -> Status:
        return Status(self._c.switch_freeze())

    def turn_on(self) -> Status:
        return Status(self._c.switch_on())

    def write(self, word: int, value: int) -> None:
        self._c.switch_write(ctypes.c_uint64(word), ctypes.c_uint64(value))

    def seen(self) -> tuple[int, int, int, list[int]]:
        """Protection, measurements, the timer, the page."""
        page = [self._c.switch_read(ctypes.c_uint64(word)) for word in range(8)]
        return self._c.switch_protection(), self._c.switch_measured(), self._c.switch_timer(), page

    def stage2_can_be_entered(self) -> bool:
        return bool(self._c.switch_hvc())


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    sources = ("host/switch.c", "el3/idle.c")
    out = build(
        tmp_path_factory.mktemp("switch") / "switch.so", sources, "-fsanitize=undefined", "-shared", "-fPIC"
    )
    code = ctypes.CDLL(str(out))
    code.switch_read.restype = code.switch_timer.restype = ctypes.c_uint64
    code.switch_freeze.restype = code.switch_on.restype = ctypes.c_int64
    return code


def freeze(one: CSwitch | Switch, on: bool) -> Status | None:
    return one.freeze() if on else None


def turn_on(one: CSwitch | Switch, on: bool) -> Status | None:
    return None if on else one.turn_on()


steps = st.one_of(
    st.tuples(st.just("tick"), st.booleans()),
    st.tuples(st.just("tick"), st.just(True)),
    st.tuples(st.just("freeze")),
    st.tuples(st.just("on")),
    st.tuples(st.just("visit")),
    st.tuples(st.just("window"), st.sampled_from([0, 1, SECOND // 50, SECOND, (1 << 64) - 1])),
    st.tuples(st.just("write"), st.integers(0, 7), WORD),
    st.tuples(st.just("write"), st.just(RequestWord.REQUEST), st.just(REQUEST_ON)),
    st.tuples(st.just("change"), st.booleans()),
)
advances = st.sampled_from([0, 1, SECOND // 1000, SECOND // 100, SECOND // 20, SECOND])
stories = st.lists(st.tuples(advances, steps), max_size=80)


@settings(max_examples=300, deadline=None)
@given(story=stories, seed=st.integers(1, (1 << 64) - 1))
def test_el3s_code_and_the_model_agree_on_any_story(
    code: ctypes.CDLL, story: list[tuple[int, tuple[Any, ...]]], seed: int
) -> None:
    real, model = CSwitch(code, seed), Switch(SECOND, START)
    for advance, (what, *how) in story:
        model.now += advance
        real.advance(model.now)
        on = model.protection == Protection.ON
        if what == "tick":
            assert real.tick(*how) == model.tick(*how)
        elif what == "freeze":
            assert freeze(real, on) == freeze(model, on)
        elif what == "on":
            assert turn_on(real, on) == turn_on(model, on)
        elif what == "visit":
            real.visit()
            model.visit()
        elif what == "window":
            real.window(*how)
            model.window(*how)
        elif what == "write":
            real.write(*how)
            model.page[how[0]] = how[1]
        elif not on:  # while it is on nobody reaches EL2
            real.change(*how)
            model.changed = how[0]
        assert real.seen() == (model.protection, model.measured, model.timer, model.page[:8])
        assert real.stage2_can_be_entered() == (model.protection == Protection.ON)


@settings(deadline=None)
@given(writes=st.lists(st.tuples(st.integers(0, 7), WORD, advances), max_size=80), changed=st.booleans())
def test_whatever_is_written_to_the_page_can_only_turn_protection_on_and_not_often(
    code: ctypes.CDLL, writes: list[tuple[int, int, int]], changed: bool
) -> None:
    real, now, requests = CSwitch(code, 1), START, 0
    assert real.freeze() == Status.OK
    real.change(changed)
    _, measured, _, page = real.seen()
    for word, value, advance in writes:
        now += advance
        real.advance(now)
        real.write(word, value)
        page[word] = value
        after = real.tick(True)
        protection, total, _, seen = real.seen()
        if after == Next.SAME and total == measured:
            assert seen == page, "nothing is written without an answer"
            continue
        assert page[RequestWord.REQUEST] == REQUEST_ON
        requests, measured = requests + 1, total
        assert protection == (Protection.TAMPERED if changed else Protection.ON)
        assert seen[len(RequestWord) :] == page[len(RequestWord) :]
        if not changed:
            break
        page = seen
    assert requests <= 1 + (now - START) // (SECOND // 20)


def test_a_window_that_runs_out_asks_el2_and_a_request_brings_protection_back(code: ctypes.CDLL) -> None:
    real, now = CSwitch(code, 7), START
    real.window(SECOND)
    assert real.seen()[2] == START + SECOND
    for at, after in ((SECOND - 1, Next.SAME), (SECOND, Next.EL2_ASKED)):
        real.advance(now + at)
        assert real.tick(True) == after
    assert real.freeze() == Status.OK
    assert not real.stage2_can_be_entered()
    real.write(RequestWord.REQUEST, REQUEST_ON)
    now = real.seen()[2]
    real.advance(now)
    assert real.tick(True) == Next.EL2_STARTED
    assert real.seen()[0] == Protection.ON
    assert real.seen()[2] == now + SECOND, "a whole window from here"


def test_the_model_writes_three_words_of_the_page() -> None:
    model = Switch(SECOND, START)
    model.page = [5] * WORDS
    model.freeze()
    assert model.page[:3] == [0, 0, Protection.OFF]
    assert set(model.page[3:]) == {5}
