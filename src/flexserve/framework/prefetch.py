"""What the next request needs, before it comes: weights and the KV of its prompt's beginning (paper, section 5).

Who is next: the next of the queue, which is certain; the model that a client named; what the workflow log predicts.
It is fetched while every request that has started decodes with all its weights in memory, so below any cold start, a
little at a time; a request that starts and a recall end it. Room for it is made of saved sessions and idle weights
only, and of these only what caching values less: a byte of a model is worth the share of requests that go to it, a
prefetched one the confidence that its request comes.

Does not know why somebody is expected (expecting.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import reclaim, requests
from .background import best_distribution
from .effects import LoadRange, Priority, RestoreSession, Why
from .reclaim import Keep, Stage
from .records import ModelRecord, Prefetched, Records, SessionRecord
from .tables import ModelState, RequestState, SegmentState, SegmentTrigger, SessionState, SessionTrigger
from .workflows import Step

ROOM = (Stage.SAVED_SESSIONS, Stage.IDLE_WEIGHTS)
_WANTED = 64  # of the expected requests, those that are looked at


@dataclass(frozen=True)
class Target:
    """A model that a request will want; `step`: how its prompt begins, where that is known."""

    model: ModelRecord
    step: Step
    session: str | None  # that the request names
    confidence: float
    why: Why


def is_under_way(records: Records) -> bool:
    """Whether something is expected: the background leaves memory as it is."""
    return bool(records.expected) and records.settings.prefetch


def work(records: Records) -> None:
    """One step: the next piece of what is most likely needed next."""
    if not records.settings.prefetch or not (records.expected or records.queue) or not _is_calm(records):
        return
    wanted = list(targets(records))
    for target in wanted:
        keep = keep_for(records, target, wanted)
        if _restore(records, target, keep) or _load(records, target, keep):
            return


def _is_calm(records: Records) -> bool:
    """Whether nothing else is loaded or wants memory: whatever runs, decodes."""
    if records.recalls or records.free < 0:
        return False
    for request in records.active.values():
        if request.state != RequestState.RUNNING or not request.decoding:
            return False
        model = records.models[request.model]
        if model.weights.missing or model.weights.bytes_in[SegmentState.LOADING] or model.streamed_bytes:
            return False
    return True


def targets(records: Records) -> Iterator[Target]:
    """Who is next, the most likely first."""
    queued = requests.next_to_start(records)
    if queued is not None:
        step = queued.expected.prediction.step if queued.expected else Step("")
        yield Target(records.models[queued.model], step, queued.asked_session, 1.0, Why.QUEUED_NEXT)
    expected = sorted(
        records.expected.values(), key=lambda e: (-e.prediction.confidence, e.prediction.client)
    )
    for one in expected[:_WANTED]:
        model = records.labelled(one.prediction.step.model)
        if model is not None:
            yield Target(model, one.prediction.step, None, one.prediction.confidence, one.why)


def keep_for(records: Records, target: Target, wanted: list[Target]) -> Keep:
    """What is worth more than what this target may need."""
    best = best_distribution(records)
    prefix: dict[str, int] = {}
    worth_more: set[str] = set()
    for share in best.shares:
        if share.rate >= target.confidence:
            prefix[share.model] = share.prefix_bytes
            worth_more.add(share.model)
    for other in wanted:  # in their order: those before this one are likelier
        if other is target:
            break
        prefix[other.model.name] = other.model.weights.size
    prefix |= records.pinned_bytes()
    sessions = {
        name
        for name in best.sessions
        if (session := records.sessions.get(name)) is not None and session.model in worth_more
    }
    for other in wanted:
        if (session := _session(records, other)) is not None:
            sessions.add(session.name)
    return Keep(prefix, frozenset(sessions))


def _session(records: Records, target: Target) -> SessionRecord | None:
    """The KV that the request will go on from, as far as is known."""
    name = target.session or records.workflows.session(target.step)
    session = records.sessions.get(name) if name else None
    return session if session is not None and session.model == target.model.name else None


def _slack(records: Records, target: Target) -> int:
    """What has to stay free: the next KV of whatever runs, and that of the request itself."""
    chunk = records.settings.kv_chunk_tokens
    running = (records.models[r.model] for r in records.active.values())
    growing = sum(records.kv_bytes(model, chunk) for model in running)
    tokens = int(target.model.usage.typical_prompt_tokens) + chunk
    return growing + records.kv_bytes(target.model, min(tokens, target.model.context_tokens))


def _make_room(records: Records, target: Target, keep: Keep, nbytes: int, least: int) -> bool:
    """See to it that so much is free beside what has to stay free.

    Nothing is taken where not even `least` would come together: what was taken in vain, the next target would fetch
    again, for ever.
    """
    slack, there = _slack(records, target), records.free + records.ledger.leaving
    if nbytes + slack > there:
        choices = reclaim.choose(records, nbytes + slack - there, ROOM, keep, target.model.name)
        if there + sum(choice.nbytes for choice in choices) < slack + least:
            return False
        reclaim.take(records, choices, target.why)
    return records.free >= nbytes + slack


def _restore(records: Records, target: Target, keep: Keep) -> bool:
    """Read the session's KV into memory, where it is in storage only; whether that was begun."""
    session = _session(records, target)
    if session is None or session.state != SessionState.STORED or session.owner is not None:
        return False
    if target.model.state != ModelState.READY:
        return False
    if not _make_room(records, target, keep, session.nbytes, session.nbytes):
        return records.ledger.leaving > 0
    records.move_session(session, SessionTrigger.RESTORE)
    _begin(target.model).session_bytes += session.nbytes
    records.do(RestoreSession(session.name), target.why, nbytes=session.nbytes)
    return True


def _load(records: Records, target: Target, keep: Keep) -> bool:
    """Load the next piece of the weights; whether it is this target's turn still."""
    model, weights = target.model, target.model.weights
    if model.state != ModelState.READY or model.active or model.stopping or not weights.missing:
        return False
    ahead = records.settings.prefetch_ahead_bytes - records.ledger.loading
    if ahead < records.settings.prefetch_ahead_bytes // 2:
        return True
    wanted = min(ahead, weights.missing)
    next_missing = weights.absent(weights.fill_from, weights.count, wanted)
    if next_missing:
        first, _ = next(iter(next_missing))
        _make_room(records, target, keep, wanted, weights.nbytes(first, first + 1))
    room = min(wanted, max(records.free - _slack(records, target), 0))
    absent = weights.absent(weights.fill_from, weights.count, room)
    if not absent:
        return records.ledger.leaving > 0
    prefetched = _begin(model)
    nbytes = records.move_segments(model, SegmentTrigger.LOAD, absent)
    prefetched.asked_bytes += nbytes
    model.refilling = model.planned = True
    records.do(
        LoadRange(model.name, weights.ranges(absent), Priority.PREFETCH),
        target.why,
        nbytes=nbytes,
        confidence=round(target.confidence, 3),
        free=records.free,
    )
    return True


def _begin(model: ModelRecord) -> Prefetched:
    if model.prefetched is None:
        weights = model.weights
        missing = weights.missing + weights.bytes_in[SegmentState.LOADING]
        model.prefetched = Prefetched(missing)
    return model.prefetched
