"""LLM-aware reclamation, stage 1: which bytes go when some must (paper, section 5).

Cheapest first: saved sessions, weights of the least invoked model from its tail, weights of models that
compute (a streamed tail that has passed by, then those needed last), idle KV that has to be saved, and last
the KV of open requests, which stop.

`choose` is a pure function from what is needed to a list; `take` carries the list out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum

from .effects import DropSession, Recall, SaveSession, StopLoading, SuspendRequest, Why
from .positions import NONE, Positions, Span
from .records import ModelRecord, Records, RequestRecord, SessionRecord
from .tables import (
    ModelState,
    RequestState,
    RequestTrigger,
    SegmentState,
    SegmentTrigger,
    SessionState,
    SessionTrigger,
)


class Stage(IntEnum):
    """How far a choice may go; each stage costs more than the one before."""

    SAVED_SESSIONS = 0
    IDLE_WEIGHTS = 1
    PASSED_WEIGHTS = 2
    USED_WEIGHTS = 3
    UNSAVED_SESSIONS = 4
    OPEN_SESSIONS = 5


CHEAP = (Stage.SAVED_SESSIONS, Stage.IDLE_WEIGHTS, Stage.PASSED_WEIGHTS)  # nothing is written, nobody waits


@dataclass(frozen=True)
class Keep:
    """What a choice leaves alone: prefixes of weights in bytes, and sessions (stage 2)."""

    prefix_bytes: Mapping[str, int]
    sessions: frozenset[str]


@dataclass(frozen=True)
class Choice:
    """Some of one model's weights, or one session."""

    why: Why
    nbytes: int
    model: str = ""
    positions: Positions = NONE
    session: str = ""


NOTHING = Keep({}, frozenset())
_WHY = {
    Stage.SAVED_SESSIONS: Why.ALREADY_SAVED,
    Stage.IDLE_WEIGHTS: Why.LEAST_INVOKED,
    Stage.PASSED_WEIGHTS: Why.PASSED_BY,
    Stage.USED_WEIGHTS: Why.TAIL_IN_USE,
    Stage.UNSAVED_SESSIONS: Why.UNSAVED,
    Stage.OPEN_SESSIONS: Why.OPEN_KV,
}


def choose(
    records: Records,
    needed: int,
    stages: tuple[Stage, ...] = tuple(Stage),
    keep: Keep = NOTHING,
    spare: str | None = None,
) -> list[Choice]:
    """What to take, cheapest first, until it is `needed` bytes or there is no more. Changes nothing.

    `spare`: a model whose weights are left alone.
    """
    chosen: list[Choice] = []
    for stage in stages:
        if stage == Stage.UNSAVED_SESSIONS:  # what batches need just now comes when they have ended
            needed -= kept_for_batches(records)
        if needed <= 0:
            break
        for choice in _at(records, stage, needed, keep, spare):
            chosen.append(choice)
            needed -= choice.nbytes
            if needed <= 0:
                break
    return chosen


def _at(records: Records, stage: Stage, needed: int, keep: Keep, spare: str | None) -> Iterator[Choice]:
    match stage:
        case Stage.SAVED_SESSIONS:
            for session in _oldest(records, (SessionState.SAVED,), keep):
                yield Choice(_WHY[stage], session.nbytes, session=session.name)
        case Stage.IDLE_WEIGHTS:
            for model in least_invoked(records):
                if model.active or model.name == spare or not model.weights.present:
                    continue
                weights = model.weights
                kept = keep.prefix_bytes.get(model.name, 0)
                low = weights.forward(weights.fill_from, kept) if kept else 0
                if found := weights.tail(low, weights.count, needed):
                    nbytes = weights.bytes_of(found)
                    needed -= nbytes
                    yield Choice(_WHY[stage], nbytes, model.name, found)
        case Stage.PASSED_WEIGHTS | Stage.USED_WEIGHTS:
            for model in least_invoked(records):
                if not model.active or model.name == spare:
                    continue
                passed, used = stretches(records, model)
                for low, high in passed if stage == Stage.PASSED_WEIGHTS else used:
                    if needed > 0 and (found := model.weights.tail(low, high, needed)):
                        nbytes = model.weights.bytes_of(found)
                        needed -= nbytes
                        yield Choice(_WHY[stage], nbytes, model.name, found)
        case Stage.UNSAVED_SESSIONS:
            for session in _oldest(records, (SessionState.RESIDENT, SessionState.SAVING), keep):
                yield Choice(_WHY[stage], session.nbytes, session=session.name)
        case Stage.OPEN_SESSIONS:
            for request in reversed(records.active.values()):  # the last to start stops first
                if not records.settings.saves or not may_stop(records, request):
                    continue
                if (session := records.sessions[request.session]).nbytes:
                    yield Choice(_WHY[stage], session.nbytes, session=session.name)


def may_stop(records: Records, request: RequestRecord) -> bool:
    """Whether a request computes, and nothing is known that keeps its KV where it is."""
    if request.state != RequestState.RUNNING:
        return False
    session = records.sessions[request.session]
    return not session.readers and session.retry_at <= records.now


def least_invoked(records: Records) -> list[ModelRecord]:
    """All models, those that go first first."""
    order = [records.models[name] for name in reversed(records.ranked())]
    if records.settings.pinned:
        order.sort(key=records.is_pinned)
    useless = [m for m in records.models.values() if m.state in (ModelState.POISONED, ModelState.LEAVING)]
    return useless + order


def streamed_from(records: Records, model: ModelRecord) -> int | None:
    """The position from which on a model that computes is streamed; None when it fits the budget."""
    weights = model.weights
    others = sum(
        records.window(other) for other in records.models.values() if other.active and other is not model
    )
    rows = records.in_memory_bytes(model) - (weights.fill_size - weights.missing)  # of an untied embedding
    room = records.budget - records.in_use() - records.reserved - others - rows
    if weights.fill_size <= room:
        return None
    return weights.forward(weights.fill_from, max(room - records.window(model), 0))


def kept_for_batches(records: Records) -> int:
    """Weights that go when the batches that compute on them have ended: their requests stop then, because the budget
    has no room for a stream's window."""
    return sum(
        model.weights.present_bytes(*_needed_now(records, model))
        for model in records.models.values()
        if records.computes(model) and records.in_use() + records.window(model) > records.budget
    )


def zone(records: Records, model: ModelRecord) -> Span:
    """Positions that compute may be at now, and those it needs next."""
    weights, settings = model.weights, records.settings
    at = max(model.compute_at, weights.fill_from)
    behind = weights.backward(at, settings.stream_behind_bytes) if at > weights.fill_from else at
    return max(behind, weights.fill_from), max(weights.forward(at, records.ahead(model)), at + 1)


def _needed_now(records: Records, model: ModelRecord) -> Span:
    """Of the zone, what a batch cannot do without: no more than a stream's window."""
    weights, window = model.weights, records.window(model)
    at = max(model.compute_at, weights.fill_from)
    begin = max(weights.backward(at, window // 2), weights.fill_from)
    end = weights.forward(begin, window)
    if end <= at:
        begin, end = at, max(weights.forward(at, window), at + 1)
    return begin, min(end, weights.count)


def stretches(records: Records, model: ModelRecord) -> tuple[list[Span], list[Span]]:
    """A model that computes: what of a streamed tail has passed by, and the rest; needed last comes first.

    Each stretch is taken from its end. What a batch needs just now stays until it has ended, whatever the budget: its
    threads would take it away from each other, and it would not end.
    """
    low, high = zone(records, model)
    weights = model.weights
    start, count = streamed_from(records, model), weights.count
    last = [(low, high)]
    if records.computes(model):
        begin, end = _needed_now(records, model)
        last = [(max(end, low), high), (low, min(begin, high))]
    if start is None:
        return [], [(high, count), (0, low), *last]
    # The tail's beginning is read ahead for the next token while compute is still in the prefix.
    top = max(high, weights.forward(start, records.ahead(model)))
    if low >= start:
        return [(start, low), (top, count)], [(0, start), (high, top), *last]
    return [(top, count)], [(max(high, start), top), (min(high, start), start), (0, low), *last]


def _oldest(records: Records, states: tuple[SessionState, ...], keep: Keep) -> list[SessionRecord]:
    """Sessions that nobody reads, the longest idle first."""
    found = [
        s
        for s in records.in_memory.values()
        if s.state in states
        and not s.readers
        and not s.goes
        and (records.settings.saves or s.owner is None)  # a suspended request's can only be saved
        and s.name not in keep.sessions
        and (s.state != SessionState.RESIDENT or s.retry_at <= records.now)
    ]
    return sorted(found, key=lambda s: (s.last_used, s.name))


def take(records: Records, choices: list[Choice], why: Why | None = None) -> int:
    """Send the effects for these choices; returns the bytes that have to be saved before they go.

    `why`: in place of the choice's own reason.
    """
    later = 0
    for choice in choices:
        reason = why or choice.why
        if choice.model:
            model = records.models[choice.model]
            records.move_segments(model, SegmentTrigger.CLAIM, choice.positions)
            records.do(
                Recall(model.name, model.weights.ranges(choice.positions)),
                reason,
                nbytes=choice.nbytes,
                stage=choice.why.value,
            )
            continue
        session = records.sessions[choice.session]
        if session.state == SessionState.SAVED:
            drop(records, session, reason)
            continue
        if not records.settings.saves and session.owner is None:
            discard(records, session, reason)
            continue
        later += choice.nbytes
        if session.state == SessionState.OPEN:
            assert session.owner is not None
            suspend(records, records.requests[session.owner], reason)
        if session.state == SessionState.SAVING:
            records.let_go(session)
            records.note(reason, session=session.name, nbytes=choice.nbytes)
        else:
            save(records, session, reason, goes=True)
    return later


def drop(records: Records, session: SessionRecord, why: Why) -> None:
    """Give back the memory of a saved session."""
    records.move_session(session, SessionTrigger.DROP)
    records.do(DropSession(session.name), why, nbytes=session.nbytes)


def discard(records: Records, session: SessionRecord, why: Why) -> None:
    """Give up idle KV that is not saved: it costs a recompute."""
    records.move_session(session, SessionTrigger.DISCARD)
    records.do(DropSession(session.name), why, nbytes=session.nbytes)


def save(records: Records, session: SessionRecord, why: Why, *, goes: bool = False) -> None:
    records.move_session(session, SessionTrigger.SAVE, goes=goes)
    records.do(SaveSession(session.name, session.version), why, nbytes=session.nbytes)


def suspend(records: Records, request: RequestRecord, why: Why, *, wanted_tokens: int = 0) -> None:
    """Stop a request between two tokens. Its KV is idle then, but still its own: never discarded."""
    records.move_request(request, RequestTrigger.SUSPEND)
    records.stop_reading(request)
    records.move_session(records.sessions[request.session], SessionTrigger.CLOSE)
    request.wanted_tokens = max(wanted_tokens, request.kv_tokens)
    request.since = records.now
    request.stops = True
    records.do(SuspendRequest(request.name), why)


def enforce(records: Records) -> int:
    """Bring what is held within the budget; returns the bytes that go later, once they are saved.

    What is in memory goes with every stage. What is on its way keeps its room if cheap bytes can make it, and is
    stopped otherwise: each loader then places at most the span it has.
    """
    over = records.ledger.held - records.ledger.leaving - records.budget
    if over <= 0:
        return 0
    for model in records.models.values():
        if model.refilling:
            stop_loading(records, model, Why.OVER_BUDGET)
    later = 0
    over = records.present - records.budget
    if over > 0:
        later = take(records, choose(records, over))
    stopped = sum(m.weights.bytes_in[SegmentState.LOADING] for m in records.models.values() if m.stopping)
    over = records.ledger.held - records.ledger.leaving - stopped - records.budget
    if over > 0 and records.ledger.loading:
        take(records, choose(records, over, CHEAP))
        if records.ledger.held - records.ledger.leaving - stopped > records.budget:
            for model in records.models.values():
                stop_loading(records, model, Why.OVER_BUDGET)
    return later


def give_up_late(records: Records) -> None:
    """Idle sessions that a recall waits for are given up when its time is over; those of a request never."""
    if records.deadline is None or records.now < records.deadline:
        return
    records.deadline = None
    for session in list(records.in_memory.values()):
        if session.state == SessionState.SAVING and session.goes and session.owner is None:
            discard(records, session, Why.DEADLINE)


def stop_loading(records: Records, model: ModelRecord, why: Why) -> None:
    if model.planned and not model.stopping and model.weights.bytes_in[SegmentState.LOADING]:
        model.stopping, model.planned = True, False
        records.do(StopLoading(model.name), why)


def make_room(
    records: Records,
    nbytes: int,
    stages: tuple[Stage, ...],
    *,
    keep: Keep = NOTHING,
    spare: str | None = None,
    why: Why | None = None,
) -> bool:
    """See to it that `nbytes` are free; False while they are not yet (or cannot be)."""
    short = nbytes - records.free - records.ledger.leaving
    if short > 0:
        take(records, choose(records, short, stages, keep, spare), why)
    return records.free >= nbytes
