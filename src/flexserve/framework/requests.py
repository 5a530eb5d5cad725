"""Requests: from the queue to their end, with the memory for their KV.

Knows sessions as ids; which of them a prompt continues is the executor's to find. Which request is next, and how long
one may wait, says schedule.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import expecting, schedule
from .effects import (
    AskOffer,
    ComputePrompt,
    GrantKv,
    LoadRange,
    Pin,
    Priority,
    Reject,
    RestoreSession,
    ResumeRequest,
    StartRequest,
    Why,
)
from .reclaim import CHEAP, Keep, Stage, discard, make_room, may_stop, stop_loading, suspend
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

FOR_KV = (*CHEAP, Stage.USED_WEIGHTS, Stage.UNSAVED_SESSIONS)
_IN_MEMORY = (SessionState.RESIDENT, SessionState.SAVING, SessionState.SAVED)


def startable(records: Records) -> list[RequestRecord]:
    """Of the queue, in the order of arrival, those whose session is not in use by another."""
    sessions = records.sessions
    return [
        one
        for one in records.queue.values()
        if one.asked_session is None
        or (session := sessions.get(one.asked_session)) is None
        or session.owner is None
    ]


def next_to_start(records: Records) -> RequestRecord | None:
    """Whose turn it is, when a slot is free (schedule.py)."""
    return schedule.choose(startable(records), records.now, records.waiting_s, records.settings)


def advance(records: Records) -> None:
    """Start, go on with and end requests, as far as slots and memory allow.

    KV comes before weights: what it waits for (or will, once the prompt is known) is kept free of loads.
    """
    records.reserved = 0
    _stop_what_would_crawl(records)
    for request in list(records.active.values()):
        if request.state == RequestState.WAITING or (
            request.state == RequestState.PREPARING and request.tokenized
        ):
            prepare(records, request)
        elif request.state == RequestState.PREPARING:
            _expect(records, request)
        elif request.state == RequestState.SUSPENDED:
            resume(records, request)
        if (
            request.state in (RequestState.WAITING, RequestState.SUSPENDED)
            and records.now - request.since >= records.settings.suspend_limit_s
        ):
            refuse_for_memory(records, request)
    while (
        records.waiting
        and len(records.active) < records.settings.compute_slots
        and (request := next_to_start(records)) is not None  # type: ignore[assignment]
    ):
        start(records, request)
        _expect(records, request)


def _stop_what_would_crawl(records: Records) -> None:
    """With less room for weights than a stream's window, threads of one matrix would take each other's segments away,
    and nothing moved. Such a request stops, goes on when there is memory again, or ends with `out_of_budget`."""
    for request in reversed(list(records.active.values())):
        if not may_stop(records, request):
            continue
        least = _least(records, records.models[request.model], 0)
        if least > records.budget:
            suspend(records, request, Why.NOT_ENOUGH)
            ask(records, least - records.budget)


def _expect(records: Records, request: RequestRecord) -> None:
    model = records.models[request.model]
    tokens = records.rounded(model, int(model.usage.typical_prompt_tokens))
    records.reserved += records.kv_bytes(model, tokens)


def start(records: Records, request: RequestRecord) -> None:
    """Its weights are loaded while the executor makes tokens of its prompt."""
    model = records.models[request.model]
    schedule.count_overtaken(startable(records), request)
    waited = records.now - request.arrived
    records.move_request(request, RequestTrigger.START)
    model.compute_at = model.weights.fill_from
    if request.asked_session is not None:  # nobody else may take it from now on
        session = records.sessions.get(request.asked_session)
        if session is not None:
            session.owner = request.name
    found = expecting.started(records, request)
    records.do(
        StartRequest(request.name, found), Why.TURN, waiting=records.waiting, waited_s=round(waited, 6)
    )
    for other in records.models.values():  # this one's too: its segments are urgent now
        if other.refilling:
            stop_loading(records, other, Why.MAKE_ROOM)
    lazy = model.weights.in_state(SegmentState.LAZY)
    if lazy:
        records.do(Pin(model.name, model.weights.ranges(lazy)), Why.MODEL_IN_USE)


def tokenized(records: Records, request: RequestRecord) -> None:
    """The prompt is known: its embedding rows come first. `prepare` does the rest."""
    model = records.models[request.model]
    request.tokenized = True
    request.since = records.now
    model.usage.prompted(request.prompt_tokens)
    expecting.tokenized(records, request)
    weights, rows = model.weights, model.weights.positions(request.rows)
    # The rows have room even where the budget is full: one loader would fetch them by a fault as well.
    absent = weights.first(weights.those(SegmentState.ABSENT, rows), records.free)
    if absent:
        records.move_segments(model, SegmentTrigger.LOAD, absent)
    # Rows of a tied embedding are on their way since the request started, but as the last of the model.
    urgent = absent if model.stopping else weights.those(SegmentState.LOADING, rows)
    if urgent:
        model.planned = True
        records.do(LoadRange(model.name, weights.ranges(urgent), Priority.ROWS), Why.PROMPT_ROWS)


def prepare(records: Records, request: RequestRecord) -> None:
    """Bring its session into memory, make room for its KV, and let it compute; or let it wait."""
    model = records.models[request.model]
    own = records.session(request.session, request.model)
    source = records.sessions.get(request.source) if request.source is not None else None
    if source is not None and (
        source.model != request.model
        or source.state == SessionState.FREEING
        or source.owner not in (None, request.name)  # another request is changing it
    ):
        source = None
    kv_tokens = records.rounded(model, request.prompt_tokens)
    size = records.kv_bytes(model, kv_tokens)
    if records.least(model, kv_tokens) > records.settings.cap_bytes:  # no offer can help
        return refuse_for_memory(records, request)
    if (
        source is not None
        and source is not own
        and _least(records, model, size + source.nbytes) > records.budget
    ):
        source = None  # both do not fit beside each other: compute it again
    unstable = (SessionState.DROPPING, SessionState.FREEING)
    if own.owner not in (None, request.name) or own.readers or own.state in unstable:
        return _wait(records, request)
    there = own.nbytes if own.state in _IN_MEMORY else 0
    if not _fits(records, model, max(size, there)):
        return _wait(records, request)
    if source is not None:
        if source.state == SessionState.STORED and _has_room(records, request, model, source.nbytes):
            records.move_session(source, SessionTrigger.RESTORE)
            records.do(RestoreSession(source.name), Why.CONTINUES_SESSION, nbytes=source.nbytes)
        if source.state in (SessionState.STORED, SessionState.RESTORING, SessionState.DROPPING):
            return _wait(records, request)
        # One that goes is dropped once it is saved, whoever reads it: it is restored then.
        if source is not own and source.goes:
            return _wait(records, request)
    elif own.state == SessionState.RESTORING:
        return _wait(records, request)
    if not _has_room(records, request, model, max(size - there, 0)):
        return _wait(records, request)
    reuse = min(request.matched_tokens, source.tokens) if source is not None else 0
    resident = not model.weights.missing and not model.weights.bytes_in[SegmentState.LOADING]
    model.pace.begin(records.now, request.prompt_tokens - reuse, resident=resident)
    records.move_session(own, SessionTrigger.OPEN, nbytes=max(size, there))
    own.owner, own.tokens = request.name, reuse
    request.kv_tokens = own.nbytes // model.kv_bytes_per_token if model.kv_bytes_per_token else kv_tokens
    if source is not None and source is not own:
        source.readers += 1
        source.last_used = records.now
        request.reads = source.name
    records.move_request(request, RequestTrigger.COMPUTE)
    records.do(
        ComputePrompt(
            request.name, own.name, source.name if source is not None else None, reuse, request.kv_tokens
        ),
        Why.READY,
        prompt_tokens=request.prompt_tokens,
        resident=model.weights.present,
    )
    return None


def _wait(records: Records, request: RequestRecord) -> None:
    if request.state == RequestState.PREPARING:
        records.move_request(request, RequestTrigger.WAIT)


def _least(records: Records, model: ModelRecord, nbytes: int) -> int:
    """The smallest budget that holds that much more KV in use, and streams the model."""
    return records.in_use() + nbytes + records.window(model)


def _fits(records: Records, model: ModelRecord, nbytes: int) -> bool:
    """Whether the budget can hold that much more KV in use. If not, memory is asked for."""
    widest = max((records.window(records.models[r.model]) for r in _running(records)), default=0)
    least = _least(records, model, nbytes) + max(widest - records.window(model), 0)
    if least > records.budget:
        ask(records, least - records.budget)
    return least <= records.budget


def _running(records: Records) -> Iterator[RequestRecord]:
    """Whoever computes keeps the room for its model's window too."""
    return (r for r in records.active.values() if r.state == RequestState.RUNNING)


def needed_sessions(records: Records, request: RequestRecord | None = None) -> Keep:
    """The sessions that requests wait with, in the order of their start and up to this one: nobody who comes
    later takes them to make room. (A recall does.)"""
    names: set[str] = set()
    for one in records.active.values():
        if one.state != RequestState.RUNNING:
            names.update(name for name in (one.session, one.source) if name)
        if one is request:
            break
    return Keep({}, frozenset(names))


def _has_room(records: Records, request: RequestRecord, model: ModelRecord, nbytes: int) -> bool:
    """Whether that much more KV is free now; if not, room is made."""
    if not _fits(records, model, nbytes):
        return False
    keep = needed_sessions(records, request)
    if make_room(records, nbytes, FOR_KV, keep=keep, why=Why.MAKE_ROOM):
        return True
    records.reserved += nbytes
    return False


def ask(records: Records, nbytes: int) -> None:
    """Tell the normal world once that a request could use more."""
    nbytes = min(nbytes, records.settings.cap_bytes - records.budget)
    if nbytes > records.asked_bytes:
        records.asked_bytes = nbytes
        records.do(AskOffer(nbytes), Why.NOT_ENOUGH, budget=records.budget)


def grow(records: Records, request: RequestRecord, tokens: int) -> None:
    """Let the KV of a running request grow, or stop the request until that is possible."""
    model = records.models[request.model]
    session = records.sessions[request.session]
    kv_tokens = records.rounded(model, tokens)
    size = records.kv_bytes(model, kv_tokens)
    if _has_room(records, request, model, max(size - session.nbytes, 0)):
        records.resize_session(session, max(size, session.nbytes))
        request.kv_tokens = kv_tokens
        records.do(GrantKv(request.name, kv_tokens), Why.KV_GROWS, nbytes=session.nbytes)
    else:
        session.tokens = request.kv_tokens
        suspend(records, request, Why.NO_MEMORY, wanted_tokens=kv_tokens)


def resume(records: Records, request: RequestRecord, *, at_any_price: bool = False) -> None:
    """Go on with a suspended request when its KV is there and may grow as it wanted.

    `at_any_price`: its KV cannot be saved, so that stopping it frees nothing.
    """
    model = records.models[request.model]
    session = records.sessions[request.session]
    size = records.kv_bytes(model, request.wanted_tokens)
    if session.state == SessionState.STORED:
        if _has_room(records, request, model, max(size, session.nbytes)):
            records.move_session(session, SessionTrigger.RESTORE)
            records.do(RestoreSession(session.name), Why.ENOUGH, nbytes=session.nbytes)
        return
    if session.state not in _IN_MEMORY or session.goes:
        return
    more = max(size - session.nbytes, 0)
    if (more or not at_any_price) and not (
        _fits(records, model, session.nbytes + more) and _has_room(records, request, model, more)
    ):
        return
    records.move_session(session, SessionTrigger.OPEN, nbytes=session.nbytes + more)
    request.kv_tokens = max(request.kv_tokens, request.wanted_tokens)
    records.move_request(request, RequestTrigger.RESUME)
    request.stops = False
    why = Why.KV_FAILED if at_any_price else Why.ENOUGH
    records.do(ResumeRequest(request.name, request.kv_tokens), why)


def refuse(records: Records, request: RequestRecord, why: Why, *, code: str, message: str, hint: str) -> None:
    """End a request with one clear error."""
    release(records, request)
    records.move_request(request, RequestTrigger.REFUSE)
    records.do(Reject(request.name, code, message, hint), why)


def refuse_for_memory(records: Records, request: RequestRecord) -> None:
    model, cap = records.models[request.model], records.settings.cap_bytes
    needed = records.least(model, request.wanted_tokens or records.rounded(model, request.prompt_tokens))
    if needed > cap:
        limit = f"no offer lifts the memory budget above {cap} bytes"
        hint = "raise the hard cap (`flexserve budget --hard`), or shorten the prompt"
    else:
        limit = f"the memory budget is {records.budget} bytes"
        hint = "raise the budget (`flexserve budget`), close other programs, or shorten the prompt"
    refuse(
        records,
        request,
        Why.NO_MEMORY,
        code="out_of_budget",
        message=f"the request needs {needed} bytes for its keys and values and for streaming model {model.label!r}, "
        f"but {limit}",
        hint=hint,
    )


def release(records: Records, request: RequestRecord) -> None:
    """Its sessions belong to nobody any more; their KV stays, and may be continued or saved."""
    for name in (request.session, request.asked_session):
        session: SessionRecord | None = records.sessions.get(name or "")
        if session is not None and session.owner == request.name:
            session.owner = None


def finish(records: Records, request: RequestRecord, tokens: int, *, keep: bool) -> None:
    """The answer ended; its KV stays as an idle session, unless it cannot be used again."""
    model = records.models[request.model]
    session = records.sessions.get(request.session) if request.session else None
    computed = request.state in (RequestState.RUNNING, RequestState.SUSPENDED)
    release(records, request)
    records.move_request(request, RequestTrigger.FINISH)
    model.usage.last_used = records.now
    records.changes += 1
    if session is None or not computed:
        return
    if session.state in (SessionState.OPEN, *_IN_MEMORY):
        # Also of a suspended one that ended first: its KV is not the one being saved.
        records.move_session(session, SessionTrigger.CLOSE)
        session.tokens = tokens
        records.resize_session(session, min(session.nbytes, records.kv_bytes(model, tokens)))
        if not (keep and tokens) or model.state == ModelState.POISONED:
            discard(records, session, Why.REQUEST_ENDED)
