"""The Framework: events in, decisions out (paper, section 5).

Synchronous and pure: no I/O, no threads, no clock but the time that comes with each event. The same events give
the same decisions, byte for byte in the trace. One event at a time: a world calls `handle` under a lock and
executes the effects in their order.

Each event changes records through the tables; then `_settle` looks at the sums and decides until there is
nothing more to do, always in the same order: within the budget, requests, their weights, the background.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from . import background, expecting, loading, prefetch, reclaim, requests, workflow_state
from . import events as ev
from .effects import AnswerRecall, CloseModel, Decision, FinishCancelled, FinishRecall, ForgetSession, Why
from .records import ModelRecord, RecallRecord, Records, RequestRecord, SessionRecord
from .settings import Settings
from .tables import (
    Impossible,
    ModelState,
    ModelTrigger,
    RequestState,
    RequestTrigger,
    SegmentState,
    SegmentTrigger,
    SessionState,
    SessionTrigger,
)
from .view import View, view_of
from .weights import Weights
from .workflows import Entry, Step, Totals

_DECISIONS = (SegmentTrigger.LOAD, SegmentTrigger.CLAIM, SegmentTrigger.HAND)


class Framework:
    """Policy. Not thread-safe."""

    def __init__(self, settings: Settings | None = None) -> None:
        self._records = Records(settings or Settings())

    @property
    def settings(self) -> Settings:
        """As they are now: limits may be set while it runs."""
        return self._records.settings

    def handle(self, now: float, event: ev.Event) -> tuple[Decision, ...]:
        """What to do about an event at a time (seconds on any clock; going back counts as standing still).

        Raises `Impossible` when the executor reports what cannot have happened; nothing is decided then.
        """
        records = self._records
        records.now = max(records.now, now)
        records.decisions = []
        _HANDLERS[type(event)](records, event)
        _settle(records, event)
        records.pace.tell(records.now, 0, loading=records.loads_weights)
        return tuple(records.decisions)

    def due(self) -> float | None:
        """When a `Tick` is wanted, at the latest; None: not before the next event."""
        records = self._records
        times = [background.lazy_at(records, name) for name in records.models]
        times += [background.save_at(records, s) for s in records.in_memory.values()]
        times += [
            r.since + self.settings.suspend_limit_s
            for r in records.active.values()
            if r.state in (RequestState.WAITING, RequestState.SUSPENDED)
        ]
        times += [records.deadline, expecting.expires_at(records)]
        if any(model.weights.missing for model in records.models.values()):
            calm = background.calm_at(records)
            times.append(calm if calm > records.now else None)
        return min((at for at in times if at is not None), default=None)

    def view(self) -> View:
        """A snapshot for people. Changes nothing."""
        return view_of(self._records)

    def workflows(self) -> tuple[Totals, list[Entry]]:
        """What is known of workflows. Changes nothing."""
        log = self._records.workflows
        return replace(log.totals), log.entries(self._records.now, self.settings)

    @property
    def workflow_changes(self) -> int:
        """Another number whenever the workflow log changed."""
        return self._records.workflows.changes

    def dump_workflows(self) -> dict[str, Any]:
        """The workflow log, for storage (workflow_state.py)."""
        return workflow_state.dump(self._records.workflows, self._records.now)

    def load_workflows(self, data: object, away_s: float) -> None:
        """At the start, before any request: go on with what was dumped so long ago. Raises `ValueError`."""
        records = self._records
        records.workflows = workflow_state.load(data, records.now, away_s, records.settings)

    def check(self) -> None:
        """Our own invariants, for tests and soaks. Raises `AssertionError`."""
        self._records.check()


def _settle(records: Records, event: ev.Event) -> None:
    reclaim.enforce(records)
    reclaim.give_up_late(records)
    _close_models(records)
    expecting.expire(records)
    requests.advance(records)
    loading.load_for_requests(records)
    if type(event) is not ev.ComputeAt:
        prefetch.work(records)
    if type(event) not in _BUSY:
        expected = prefetch.is_under_way(records)
        background.work(records, only_refill=type(event) is ev.SegmentsChanged, refill=not expected)
    _finish_recalls(records)


def _finish_recalls(records: Records) -> None:
    freed = records.ledger.freed
    nothing_leaves = not records.ledger.leaving and not any(r.stops for r in records.active.values())
    for recall in list(records.recalls):
        kv_is_back = records.ledger.freed_kv >= recall.kv_goal or not records.ledger.leaving_kv
        if (freed >= recall.goal and kv_is_back) or nothing_leaves:
            records.recalls.remove(recall)
            got = max(min(freed, recall.goal) - recall.started, 0)
            records.do(FinishRecall(recall.call, got), Why.GIVEN_BACK, chosen=recall.goal - recall.started)
    if not records.recalls:
        records.deadline = None


def _close_models(records: Records) -> None:
    """Models that are unregistered close when nothing of them is in use and their sessions are in storage."""
    for model in list(records.models.values()):
        if model.state != ModelState.LEAVING or model.active:
            continue
        reclaim.stop_loading(records, model, Why.MODEL_LEAVES)
        sessions = [s for s in records.in_memory.values() if s.model == model.name]
        for session in sessions:
            if session.state == SessionState.SAVED and not session.readers:
                reclaim.drop(records, session, Why.MODEL_LEAVES)
            elif session.state == SessionState.RESIDENT:
                if session.retry_at > records.now:  # it could not be saved just now
                    reclaim.discard(records, session, Why.MODEL_LEAVES)
                else:
                    reclaim.save(records, session, Why.MODEL_LEAVES, goes=True)
            elif session.state == SessionState.SAVING and not session.goes:
                records.let_go(session)
        if not sessions and not model.weights.bytes_in[SegmentState.LOADING]:
            records.move_model(model, ModelTrigger.CLOSE)
            records.do(CloseModel(model.name), Why.MODEL_LEAVES)


# Models and their segments


def _model_registered(records: Records, event: ev.ModelRegistered) -> None:
    if event.model in records.models:
        raise Impossible(f"model {event.model!r} is registered already: remove it first")
    weights = Weights(event.parts, records.ledger)
    label = event.label or event.model
    model = ModelRecord(
        event.model, weights, event.kv_bytes_per_token, event.context_tokens, label, event.fixed_bytes
    )
    records.models[event.model] = model
    records.move_model(model, ModelTrigger.REGISTER)
    records.budget = max(records.budget, records.floor)


def _model_poisoned(records: Records, event: ev.ModelPoisoned) -> None:
    model = records.models.get(event.model)
    if model is None or model.state == ModelState.CLOSING:
        return records.note(Why.LATE)
    records.move_model(model, ModelTrigger.POISON)
    model.error = (event.code, event.message)
    stopped = (RequestState.QUEUED, RequestState.WAITING, RequestState.SUSPENDED)
    for request in list(records.requests.values()):
        if request.model == model.name and request.state in stopped:
            _refuse_poisoned(records, request, model)
    return None


def _refuse_poisoned(records: Records, request: RequestRecord, model: ModelRecord) -> None:
    hint = "the model is not answered with until it is registered again"
    code, message = model.error
    requests.refuse(records, request, Why.MODEL_POISONED, code=code, message=message, hint=hint)


def _model_removed(records: Records, event: ev.ModelRemoved) -> None:
    model = records.models.get(event.model)
    if model is None or model.state == ModelState.CLOSING:
        return records.note(Why.LATE)
    records.move_model(model, ModelTrigger.REMOVE)
    for request in list(records.requests.values()):
        if request.model == model.name and request.state == RequestState.QUEUED:
            _refuse_unknown(records, request, Why.MODEL_LEAVES)
    return None


def _refuse_unknown(records: Records, request: RequestRecord, why: Why) -> None:
    message = f"no model {request.model!r} is registered"
    hint = "`flexserve list` names the models a running server has"
    requests.refuse(records, request, why, code="model_not_found", message=message, hint=hint)


def _model_closed(records: Records, event: ev.ModelClosed) -> None:
    """Its saved sessions stay in storage: whoever registers it again says which of them there are."""
    for session in [s for s in records.sessions.values() if s.model == event.model]:
        records.move_session(session, SessionTrigger.FORGET)
    records.move_model(records.models[event.model], ModelTrigger.CLOSED)


def _segments_changed(records: Records, event: ev.SegmentsChanged) -> None:
    if event.what in _DECISIONS:
        raise Impossible(f"{event.what} is decided here, and not reported")
    model = records.models.get(event.model)
    if model is None or model.state == ModelState.CLOSING:
        return records.note(Why.LATE)
    changed = records.move_segments(model, event.what, model.weights.positions(event.ranges))
    if event.what == SegmentTrigger.PLACED:
        records.pace.tell(records.now, changed, loading=records.loads_weights)
    if event.what == SegmentTrigger.STOPPED:
        model.stopping = False
    elif event.what == SegmentTrigger.LOST and changed:
        records.pressed_at = records.now
    if not model.weights.bytes_in[SegmentState.LOADING]:
        model.refilling = False
    return None


def _compute_at(records: Records, event: ev.ComputeAt) -> None:
    model = records.models.get(event.model)
    if model is not None and model.active:
        model.compute_at = model.weights.position(event.segment)


# Requests


def _request_arrived(records: Records, event: ev.RequestArrived) -> None:
    if event.request in records.requests:
        raise Impossible(f"two requests have the id {event.request!r}")
    request = RequestRecord(event.request, event.model, records.now, event.session, since=records.now)
    records.arrivals += 1
    request.number, request.priority = records.arrivals, event.priority
    request.client, request.next_model = event.client, event.next_model
    full = records.waiting >= records.settings.queue_limit
    records.move_request(request, RequestTrigger.ARRIVE)
    model = records.models.get(event.model)
    if model is None or model.state in (ModelState.LEAVING, ModelState.CLOSING):
        return _refuse_unknown(records, request, Why.UNKNOWN_MODEL)
    if model.state == ModelState.POISONED:
        return _refuse_poisoned(records, request, model)
    if full:
        message = f"{records.settings.queue_limit} requests are waiting"
        hint = "send the request again later"
        return requests.refuse(records, request, Why.QUEUE_FULL, code="busy", message=message, hint=hint)
    model.usage.invoked(records.now, records.settings)
    records.changes += 1
    expecting.arrived(records, request)
    return None


def _prompt_tokenized(records: Records, event: ev.PromptTokenized) -> None:
    request = records.requests.get(event.request)
    if request is None:
        return records.note(Why.LATE)
    if request.state != RequestState.PREPARING or request.tokenized:
        raise Impossible(f"request {request.name!r} is {request.state}, and not about to be tokenized")
    known = records.sessions.get(event.session)
    if known is not None and known.model != request.model:
        raise Impossible(f"session {event.session!r} belongs to model {known.model!r}, not {request.model!r}")
    request.session, request.source = event.session, event.source
    request.prompt_tokens, request.matched_tokens = event.prompt_tokens, event.matched_tokens
    request.rows, request.prefix = event.rows, event.prefix
    requests.tokenized(records, request)
    return None


def _decode_started(records: Records, event: ev.DecodeStarted) -> None:
    request = records.requests.get(event.request)
    if request is not None:
        records.stop_reading(request)
        request.decoding = True
        records.models[request.model].pace.end(records.now)
        expecting.expect(records, request)


def _request_paused(records: Records, event: ev.RequestPaused) -> None:
    request = records.requests.get(event.request)
    if request is None or request.state != RequestState.SUSPENDED:
        return records.note(Why.LATE)
    request.stops = False
    return None


def _kv_growing(records: Records, event: ev.KvGrowing) -> None:
    request = records.requests.get(event.request)
    if request is None:
        return records.note(Why.LATE)
    if request.state == RequestState.RUNNING:
        requests.grow(records, request, event.tokens)
    else:  # it was stopped meanwhile, and needs that much to go on
        request.wanted_tokens = max(request.wanted_tokens, event.tokens)
    return None


def _request_finished(records: Records, event: ev.RequestFinished) -> None:
    request = records.requests.get(event.request)
    if request is None:
        return records.note(Why.LATE)
    requests.finish(records, request, event.tokens, keep=event.keep)
    expecting.finished(records, request)
    expecting.expect(records, request)
    return None


def _request_cancelled(records: Records, event: ev.RequestCancelled) -> None:
    request = records.requests.get(event.request)
    if request is None or request.state in (RequestState.PREPARING, RequestState.RUNNING):
        return  # the executor stops it, and reports that it finished
    requests.release(records, request)
    records.move_request(request, RequestTrigger.CANCEL)
    records.do(FinishCancelled(request.name), Why.CLIENT_LEFT)


# Sessions


def _session_found(records: Records, event: ev.SessionFound) -> None:
    model = records.models.get(event.model)
    if event.session in records.sessions:
        raise Impossible(f"session {event.session!r} is known already")
    if model is None:
        records.note(Why.LATE)
        return
    records.workflows.keep_session(Step(model.label, event.prefix), event.session, records.settings)
    session = SessionRecord(event.session, event.model, tokens=event.tokens, copied=True)
    session.last_used = records.now
    records.move_session(session, SessionTrigger.FOUND, nbytes=records.kv_bytes(model, event.tokens))


def _saved(records: Records, event: ev.SessionSaved) -> None:
    session = records.sessions.get(event.session)
    if session is None:
        return records.do(ForgetSession(event.session), Why.STALE)
    session.copied = True
    goes = session.goes
    if session.version != event.version or session.state not in (SessionState.SAVING, SessionState.FREEING):
        return records.note(Why.STALE, session=session.name, version=event.version, now=session.version)
    records.move_session(session, SessionTrigger.SAVED)
    if goes:
        reclaim.drop(records, session, Why.ALREADY_SAVED)
    return None


def _save_failed(records: Records, event: ev.SessionSaveFailed) -> None:
    session = records.sessions.get(event.session)
    if (
        session is None
        or session.version != event.version
        or session.state not in (SessionState.SAVING, SessionState.FREEING)
    ):
        return records.note(Why.LATE)
    session.retry_at = records.now + records.settings.save_retry_s
    records.move_session(session, SessionTrigger.SAVE_FAILED)
    owner = records.requests.get(session.owner or "")
    if owner is not None and owner.state == RequestState.SUSPENDED:
        requests.resume(records, owner, at_any_price=True)
    return None


def _restored(records: Records, event: ev.SessionRestored) -> None:
    session = records.sessions[event.session]
    records.move_session(session, SessionTrigger.RESTORED)
    session.last_used = records.now


def _restore_failed(records: Records, event: ev.SessionRestoreFailed) -> None:
    session = records.sessions[event.session]
    owner = records.requests.get(session.owner or "")
    records.move_session(session, SessionTrigger.RESTORE_FAILED)
    records.do(ForgetSession(session.name), Why.STALE)
    if owner is not None and owner.state == RequestState.SUSPENDED:
        message = f"the keys and values of request {owner.name!r} could not be read back from storage"
        requests.refuse(
            records,
            owner,
            Why.KV_FAILED,
            code="storage_failed",
            message=message,
            hint="send the request again",
        )


def _dropped(records: Records, event: ev.SessionDropped) -> None:
    session = records.sessions[event.session]
    records.move_session(session, SessionTrigger.DROPPED)
    if session.state == SessionState.GONE and session.copied:
        records.do(ForgetSession(session.name), Why.STALE)


# Memory


def _pressure_recall(records: Records, event: ev.PressureRecall) -> None:
    """Take `nbytes` of what is in memory: the budget falls to what remains, so that nothing grows back."""
    expecting.cancel_all(records, Why.OVER_BUDGET)
    ledger, floor = records.ledger, records.floor
    present, leaving = records.present, ledger.leaving
    promised = min(event.nbytes, max(present - floor, 0))
    records.budget = max(floor, min(records.budget, present - event.nbytes))
    records.pressed_at, records.asked_bytes = records.now, 0
    if event.deadline_s is not None:
        at = records.now + event.deadline_s
        records.deadline = at if records.deadline is None else min(at, records.deadline)
    later = reclaim.enforce(records)
    over = max(ledger.held - ledger.leaving - records.budget, 0)
    kept = min(over, reclaim.kept_for_batches(records))
    chosen = min(ledger.leaving - leaving + kept, promised)
    records.do(
        AnswerRecall(event.call, chosen, min(later + kept, chosen)),
        Why.CHOSEN,
        asked=event.nbytes,
        present=present,
        budget=records.budget,
    )
    started = ledger.freed + leaving
    kv_goal = ledger.freed_kv + ledger.leaving_kv
    records.recalls.append(RecallRecord(event.call, started, started + chosen, kv_goal))


def _offer(records: Records, event: ev.Offer) -> None:
    _move_budget(records, records.budget + event.nbytes)


def _budget_set(records: Records, event: ev.BudgetSet) -> None:
    settings = records.settings
    cap = settings.cap_bytes if event.cap_bytes is None else event.cap_bytes
    floor = settings.floor_bytes if event.floor_bytes is None else event.floor_bytes
    if floor > cap:
        raise Impossible(f"a floor of {floor} bytes is above a cap of {cap} bytes")
    start = max(floor, min(settings.budget_bytes, cap))
    records.settings = replace(settings, budget_bytes=start, cap_bytes=cap, floor_bytes=floor)
    _move_budget(records, records.budget if event.nbytes is None else event.nbytes)


def _move_budget(records: Records, nbytes: int) -> None:
    before, settings = records.budget, records.settings
    records.budget = max(records.floor, min(nbytes, settings.cap_bytes))
    records.asked_bytes = 0
    records.note(Why.BUDGET_MOVED, before=before, budget=records.budget)


# Workflows


def _workflow_declared(records: Records, event: ev.WorkflowDeclared) -> None:
    records.workflows.declare(records.now, event.client, event.name, event.models, records.settings)
    records.note(Why.DECLARED, workflow=event.name, steps=len(event.models))


def _workflows_forgotten(records: Records, event: ev.WorkflowsForgotten) -> None:
    records.note(Why.FORGOTTEN, lines=records.workflows.forget(event.client, event.entry))


def _tick(records: Records, event: ev.Tick) -> None:
    """Nothing happened but time."""


_HANDLERS: dict[type[Any], Callable[[Records, Any], None]] = {
    ev.ModelRegistered: _model_registered,
    ev.ModelPoisoned: _model_poisoned,
    ev.ModelRemoved: _model_removed,
    ev.ModelClosed: _model_closed,
    ev.SegmentsChanged: _segments_changed,
    ev.ComputeAt: _compute_at,
    ev.RequestArrived: _request_arrived,
    ev.PromptTokenized: _prompt_tokenized,
    ev.DecodeStarted: _decode_started,
    ev.KvGrowing: _kv_growing,
    ev.RequestPaused: _request_paused,
    ev.RequestFinished: _request_finished,
    ev.RequestCancelled: _request_cancelled,
    ev.SessionFound: _session_found,
    ev.SessionSaved: _saved,
    ev.SessionSaveFailed: _save_failed,
    ev.SessionRestored: _restored,
    ev.SessionRestoreFailed: _restore_failed,
    ev.SessionDropped: _dropped,
    ev.PressureRecall: _pressure_recall,
    ev.Offer: _offer,
    ev.BudgetSet: _budget_set,
    ev.WorkflowDeclared: _workflow_declared,
    ev.WorkflowsForgotten: _workflows_forgotten,
    ev.Tick: _tick,
}
_BUSY = frozenset({ev.ComputeAt, ev.KvGrowing, ev.DecodeStarted})  # a request computes: no background work
