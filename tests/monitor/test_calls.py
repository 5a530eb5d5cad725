"""The C monitor and the model answer the same calls alike, and nobody ever reads a secret."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexserve.monitor.abi import ITEM_BLOCK, MODE_ASYNC, MODE_SYNC, Call, SecureCall, Service, State, Status
from flexserve.monitor.model import BLOCK, BLOCK_PAGES, DRAM_BASE, PAGE, Monitor, Pages

from .host_build import PAGES, HostMonitor

LIST = DRAM_BASE + (PAGES - 8) * PAGE  # where the manager writes its lists
END = DRAM_BASE + PAGES * PAGE


@dataclass
class Pair:
    """Both, driven together. A call that an interrupt stops is resumed, and must end as if it had not been."""

    c: HostMonitor
    model: Monitor
    ticket: int = 0

    def finish(self, result: tuple[int, ...]) -> tuple[int, ...]:
        while result[0] == Status.PREEMPTED:
            self.c.interrupt_in(0)
            assert self.c.call(Call.SECURE_CALL, Service.ECHO, 1, 2)[0] == Status.BUSY
            assert self.c.wrong() is None
            result = self.c.call(Call.RESUME)
        self.c.interrupt_in(0)
        return result

    def want(self, pages: int) -> None:
        got = self.finish(self.c.call(Call.SECURE_CALL, Service.WANT, pages))
        assert got[:3] == self.model.want(pages)
        self.ticket = self.model.ticket

    def donate(self, items: list[int], ticket: int, list_address: int = LIST) -> Status:
        written = all(self.c.write(list_address + 8 * i, item) for i, item in enumerate(items))
        got = self.finish(self.c.call(Call.DONATE, list_address, len(items), ticket))
        expected = self.model.donate(list_address, items, ticket)
        assert written or expected[0] in (Status.RANGE, Status.INVALID, Status.TICKET)
        assert got[:2] == expected
        return expected[0]

    def reclaim(self, pages: int, mode: int) -> None:
        assert self.finish(self.c.call(Call.RECLAIM, pages, mode))[:2] == self.model.reclaim(pages, mode)

    def run(self, pages: int) -> None:
        assert self.finish(self.c.call(Call.RUN, pages))[:3] == self.model.run(pages)

    def touch(self, address: int) -> None:
        state = self.model.touch(address)
        how, _ = self.c.read(address)
        assert how == {State.UNPROTECTED: 0, State.FLEX: 1, State.CLAIMED: 2}[state]
        if state == State.CLAIMED:
            assert self.c.read(address) == (0, 0), "a claimed page is zero when the access goes on"

    def check(self, pages: list[int]) -> None:
        assert self.c.wrong() is None
        assert self.c.call(Call.STATS)[:3] == self.model.stats()
        for page in pages:
            address = DRAM_BASE + page * PAGE
            state = self.model.pages.state(address)
            assert self.c.state(address) == state
            assert self.c.call(Call.QUERY, address)[:2] == (Status.OK, state)


@pytest.fixture
def pair(host: HostMonitor) -> Pair:
    return Pair(host, Monitor(Pages(PAGES)))


def storm(pair: Pair, draw: random.Random, calls: int) -> None:
    """Calls as a manager, a buggy manager and an attacker make them."""
    pages = [0, 1, 2, 3, 4, BLOCK_PAGES - 1, BLOCK_PAGES, BLOCK_PAGES + 1, PAGES - 8, PAGES - 1]

    def item() -> int:
        if draw.random() < 0.12:
            return (DRAM_BASE + draw.randrange(2) * BLOCK) | ITEM_BLOCK
        if draw.random() < 0.04:
            return draw.choice([0, 7, DRAM_BASE - PAGE, END, END | 1, DRAM_BASE + PAGE + 8, (1 << 64) - PAGE])
        return DRAM_BASE + draw.choice(pages) * PAGE

    for _ in range(calls):
        what = draw.random()
        pair.c.interrupt_in(draw.choice([0, 0, 1, 2, 3]))
        if what < 0.2:
            pair.want(draw.choice([0, 1, 2, 3, BLOCK_PAGES, BLOCK_PAGES + 2, PAGES, PAGES + 1, 1 << 63]))
        elif what < 0.6:
            ticket = pair.ticket if draw.random() < 0.95 else draw.choice([0, pair.ticket + 1, 1 << 32])
            address = LIST if draw.random() < 0.95 else draw.choice([LIST + 4, END - 8, END, 0, DRAM_BASE])
            count = draw.choice([0, 1, 1, 2, 3, 5])
            # with distinct items most of the time, so that donations succeed
            items = [item() for _ in range(count)]
            if draw.random() < 0.7:
                items = list(dict.fromkeys(items))
            pair.donate(items, ticket, address)
        elif what < 0.75:
            mode = draw.choice([MODE_SYNC, MODE_ASYNC, MODE_ASYNC, 2])
            pair.reclaim(draw.choice([0, 1, 1, 2, 3, BLOCK_PAGES, PAGES]), mode)
        elif what < 0.85:
            pair.run(draw.choice([0, 1, 2, BLOCK_PAGES, PAGES]))
        else:
            pair.c.interrupt_in(0)
            pair.touch(DRAM_BASE + draw.choice(pages) * PAGE)
        pair.c.interrupt_in(0)
    pair.check(pages)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), calls=st.integers(1, 60))
def test_the_c_code_and_the_model_agree_on_any_sequence_of_calls(
    host: HostMonitor, seed: int, calls: int
) -> None:
    host.reset()
    storm(Pair(host, Monitor(Pages(PAGES))), random.Random(seed), calls)


@pytest.mark.slow
def test_a_million_calls(host: HostMonitor) -> None:
    draw = random.Random(5)
    for _ in range(5000):
        host.reset()
        storm(Pair(host, Monitor(Pages(PAGES))), draw, 200)


def test_what_is_taken_back_is_zero_and_the_rest_is_untouched(pair: Pair) -> None:
    pair.want(3)
    assert pair.donate([DRAM_BASE, DRAM_BASE + PAGE, DRAM_BASE + BLOCK], pair.ticket) == Status.OK
    pair.reclaim(1, MODE_SYNC)
    assert pair.c.read(DRAM_BASE + BLOCK) == (0, 0)
    assert pair.c.read(DRAM_BASE)[0] == 1
    pair.check([0, 1, BLOCK_PAGES])


def test_a_block_can_be_taken_back_page_by_page_and_becomes_one_entry_again(pair: Pair) -> None:
    pair.want(BLOCK_PAGES)
    assert pair.donate([DRAM_BASE | ITEM_BLOCK], pair.ticket) == Status.OK
    for _ in range(BLOCK_PAGES // 64):
        pair.reclaim(64, MODE_ASYNC)
        pair.touch(DRAM_BASE + 5 * PAGE)
        pair.run(64)
        pair.check([0, 5, 6, BLOCK_PAGES - 1])
    assert pair.model.stats() == (0, 0, 0)


@pytest.mark.parametrize("call", list(SecureCall))
def test_the_normal_world_cannot_make_the_trusted_oss_calls(host: HostMonitor, call: SecureCall) -> None:
    assert host.call(call, 1)[0] == Status.NOT_SUPPORTED


@given(call=st.integers(0, (1 << 32) - 1), a=st.integers(0, (1 << 64) - 1), b=st.integers(0, (1 << 64) - 1))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_id_and_arguments_get_an_answer_and_break_nothing(
    host: HostMonitor, call: int, a: int, b: int
) -> None:
    status = host.call(call, a, b, a)[0]
    assert call in list(Call) or status == Status.NOT_SUPPORTED
    assert host.wrong() is None
