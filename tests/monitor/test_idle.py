"""What EL3's timer decides, in C and in the model: off after the window, on by request, at a pace."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexserve.monitor.abi import REQUEST_ON
from flexserve.monitor.idle import END_OF_TIME, NEVER, Decision, Idle

from .host_build import build

POLL, GAP = 100, 500
START = 1_000_000


class State(ctypes.Structure):
    """`struct idle` of firmware/el3/idle.h."""

    _fields_ = (
        ("poll", ctypes.c_uint64),
        ("gap", ctypes.c_uint64),
        ("window", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
        ("acted", ctypes.c_uint64 * 2),
    )


class CIdle:
    """The C code behind the model's methods."""

    def __init__(self, code: ctypes.CDLL, poll: int, gap: int) -> None:
        self._code = code
        self._state = State(poll, gap)

    def use(self, now: int) -> None:
        self._code.idle_use(ctypes.byref(self._state), ctypes.c_uint64(now))

    def set_window(self, ticks: int, now: int) -> None:
        self._code.idle_set_window(ctypes.byref(self._state), ctypes.c_uint64(ticks), ctypes.c_uint64(now))

    def decide(self, now: int, on: bool, request: int) -> Decision:
        arguments = (ctypes.c_uint64(now), ctypes.c_bool(on), ctypes.c_uint64(request))
        return Decision(self._code.idle_decide(ctypes.byref(self._state), *arguments))

    def next(self, now: int, on: bool) -> int:
        return int(self._code.idle_next(ctypes.byref(self._state), ctypes.c_uint64(now), ctypes.c_bool(on)))


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    out = tmp_path_factory.mktemp("idle") / "idle.so"
    code = ctypes.CDLL(str(build(out, ("el3/idle.c",), "-fsanitize=undefined", "-shared", "-fPIC")))
    code.idle_next.restype = ctypes.c_uint64
    return code


windows = st.one_of(
    st.sampled_from([0, 1, GAP, 2 * GAP, 10 * GAP, END_OF_TIME, END_OF_TIME - START]),
    st.integers(0, END_OF_TIME),
)
words = st.one_of(st.sampled_from([0, REQUEST_ON]), st.integers(0, END_OF_TIME))
steps = st.one_of(
    st.tuples(st.just("use")),
    st.tuples(st.just("window"), windows),
    st.tuples(st.just("decide"), st.booleans(), words),
    st.tuples(st.just("next"), st.booleans()),
)
# Clocks of two CPUs are read one after the other: a time can be a little before the last one.
advances = st.one_of(st.integers(-20, 20), st.integers(0, 10 * GAP), st.integers(0, 1 << 50))


@settings(max_examples=300, deadline=None)
@given(story=st.lists(st.tuples(advances, steps), max_size=60), gap=st.sampled_from([0, 1, GAP]))
def test_the_c_code_decides_as_the_model_does(
    code: ctypes.CDLL, story: list[tuple[int, tuple[Any, ...]]], gap: int
) -> None:
    real, model, now = CIdle(code, POLL, gap), Idle(POLL, gap), START
    for advance, (what, *how) in story:
        now += advance
        for one in (real, model):
            if what == "use":
                one.use(now)
            elif what == "window":
                one.set_window(how[0], now)
        if what == "decide":
            assert real.decide(now, *how) == model.decide(now, *how)
        elif what == "next":
            assert real.next(now, *how) == model.next(now, *how)


@settings(deadline=None)
@given(
    story=st.lists(st.tuples(st.integers(0, 2 * GAP), st.booleans(), words, st.booleans()), max_size=100),
    window=windows,
)
def test_it_never_acts_early_nor_faster_than_its_pace(
    code: ctypes.CDLL, story: list[tuple[int, bool, int, bool]], window: int
) -> None:
    idle, now = CIdle(code, POLL, GAP), START
    idle.set_window(window, now)
    used, last = now, {Decision.ON: 0, Decision.OFF: 0}
    for advance, on, word, use in story:
        now += advance
        if use:
            idle.use(now)
            used = now
        decision = idle.decide(now, on, word)
        if decision == Decision.WAIT:
            continue
        assert decision == (Decision.OFF if on else Decision.ON)
        assert now - last[decision] >= GAP
        assert word == REQUEST_ON or on, "no other word does anything"
        assert not on or 0 < window <= now - used
        last[decision] = now


@settings(deadline=None)
@given(window=st.integers(1, 1 << 40), busy=st.integers(0, 5))
def test_whoever_follows_the_timer_goes_off_soon_after_the_window_also_when_it_was_refused(
    code: ctypes.CDLL, window: int, busy: int
) -> None:
    idle, now = CIdle(code, POLL, GAP), START
    idle.set_window(window, now)
    for _ in range(busy + 1):
        before, now = now, idle.next(now, True)
        assert now > before
        while idle.decide(now, True, 0) == Decision.WAIT:
            now = idle.next(now, True)
        assert now - before <= window + max(window // 2, GAP) + GAP
    assert now >= START + window


@settings(deadline=None)
@given(before=st.lists(st.integers(0, 3 * GAP), max_size=20))
def test_a_request_is_answered_within_a_gap_and_a_poll(code: ctypes.CDLL, before: list[int]) -> None:
    idle, now = CIdle(code, POLL, GAP), START
    for advance in before:
        now += advance
        idle.decide(now, False, REQUEST_ON)
    asked = now
    while idle.decide(now, False, REQUEST_ON) == Decision.WAIT:
        now = idle.next(now, False)
    assert now - asked <= GAP + POLL


def test_of_two_cpus_at_the_same_time_one_acts(code: ctypes.CDLL) -> None:
    idle = CIdle(code, POLL, GAP)
    idle.set_window(GAP, START)
    now = START + GAP
    assert [idle.decide(now, True, 0) for _ in range(2)] == [Decision.OFF, Decision.WAIT]
    assert [idle.decide(now, False, REQUEST_ON) for _ in range(2)] == [Decision.ON, Decision.WAIT]


def test_without_a_window_the_timer_is_off_while_protection_is_on(code: ctypes.CDLL) -> None:
    idle = CIdle(code, POLL, GAP)
    assert idle.next(START, True) == NEVER
    assert idle.next(START, False) == START + POLL
    assert idle.decide(END_OF_TIME, True, REQUEST_ON) == Decision.WAIT
