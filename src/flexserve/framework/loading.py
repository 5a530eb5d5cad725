"""Which weights are loaded for the requests that compute: within the budget, never beyond it.

A model that fits is loaded as a whole, in execution order. One that does not is *streamed*: the earliest part
stays, the tail passes through a window, for every token. Compute tells where it is by waiting (`ComputeAt`).
"""

from __future__ import annotations

from .effects import LoadRange, Priority, StreamTail, Why
from .positions import Span
from .reclaim import CHEAP, Keep, Stage, make_room, streamed_from, zone
from .records import ModelRecord, Records
from .requests import ask, needed_sessions
from .tables import RequestState, SegmentState, SegmentTrigger

FOR_WEIGHTS = (*CHEAP, Stage.UNSAVED_SESSIONS)


def load_for_requests(records: Records) -> None:
    """Ask for what the requests that have started need next."""
    keep = needed_sessions(records)
    for request in list(records.active.values()):
        if request.state == RequestState.SUSPENDED:
            continue
        model = records.models[request.model]
        start = streamed_from(records, model)
        _tell(records, model, start)
        if model.stopping or not model.weights.missing:
            continue
        if start is None:
            _whole(records, model, keep)
        else:
            _window(records, model, start, keep)


def _tell(records: Records, model: ModelRecord, start: int | None) -> None:
    streamed = 0 if start is None else model.weights.nbytes(start, model.weights.count)
    if streamed != model.streamed_bytes:
        model.streamed_bytes = streamed
        why = Why.NOT_ENOUGH if streamed else Why.ENOUGH
        records.do(StreamTail(model.name, streamed), why, budget=records.budget, kv=records.kv_in_use())
    if streamed:
        window = records.window(model)
        ask(records, records.in_use() + model.weights.fill_size + window - records.budget)


def _whole(records: Records, model: ModelRecord, keep: Keep) -> None:
    weights, ahead = model.weights, records.settings.load_ahead_bytes
    wanted = weights.missing
    if records.free - records.reserved < wanted:  # room has to be made, and it is made as loading goes on
        loading = weights.bytes_in[SegmentState.LOADING]
        if loading > ahead // 2:
            return
        wanted = min(wanted, ahead - loading)
        make_room(
            records, wanted + records.reserved, FOR_WEIGHTS, keep=keep, spare=model.name, why=Why.MAKE_ROOM
        )
    _load(records, model, (weights.fill_from, weights.count), wanted, Why.MODEL_IN_USE)


def _window(records: Records, model: ModelRecord, start: int, keep: Keep) -> None:
    weights = model.weights
    missing = weights.absent_bytes(weights.fill_from, start)
    if missing:
        make_room(records, missing + records.reserved, FOR_WEIGHTS, keep=keep, why=Why.MAKE_ROOM)
        _load(records, model, (weights.fill_from, start), missing, Why.MODEL_IN_USE)
    low, high = zone(records, model)
    low = max(min(model.compute_at, weights.count), start)
    high = max(high, weights.forward(start, records.ahead(model)))
    missing = weights.absent_bytes(low, high)
    if missing:
        make_room(records, missing + records.reserved, FOR_WEIGHTS, keep=keep, why=Why.MAKE_ROOM)
        _load(records, model, (low, high), missing, Why.STREAMED)


def _load(records: Records, model: ModelRecord, within: Span, nbytes: int, why: Why) -> None:
    """Ask for at most `nbytes` of what is absent, as far as room is free now."""
    room = min(nbytes, records.free - records.reserved)
    if room > 0 and (absent := model.weights.absent(*within, room)):
        nbytes = records.move_segments(model, SegmentTrigger.LOAD, absent)
        model.planned = True
        records.do(
            LoadRange(model.name, model.weights.ranges(absent), Priority.REQUEST),
            why,
            nbytes=nbytes,
            free=records.free,
        )
