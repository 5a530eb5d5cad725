"""Requests that have not come yet: who is expected, whether they came, and what fetching for them brought.

Between the workflow log (workflows.py), which knows what usually comes next, and prefetch.py, which fetches for it.
Does not decide what is fetched.
"""

from __future__ import annotations

from . import reclaim
from .effects import Why
from .records import Expected, ModelRecord, Prefetched, Records, RequestRecord
from .tables import SegmentState
from .workflows import Step


def expect(records: Records, request: RequestRecord) -> None:
    """A request decodes, or has ended: who comes next from its client?"""
    settings, log = records.settings, records.workflows
    if not request.tokenized:
        return
    log.touch(records.now, request.client)
    if not settings.prefetch:
        return
    known = records.expected.get(request.client)
    if known is not None and known.behind == request.name:
        known.until = records.now + settings.prefetch_wait_s
        return
    if known is not None or any(r.client == request.client for r in records.queue.values()):
        return  # the queue says it
    if request.next_model:
        found, why = log.hinted(request.client, request.next_model), Why.HINTED
    elif (predicted := log.predict(records.now, request.client, settings)) is not None:
        found, why = predicted, Why.PREDICTED
    else:
        return
    until = records.now + settings.prefetch_wait_s
    records.expected[request.client] = Expected(found, why, request.name, until)
    records.note(why, next_model=found.step.model, confidence=round(found.confidence, 3))


def arrived(records: Records, request: RequestRecord) -> None:
    """A request of a client came: was it the one that was expected?"""
    expected = records.expected.pop(request.client, None)
    if expected is None:
        return
    if expected.prediction.step.model == records.models[request.model].label:
        request.expected = expected
        records.note(Why.CAME_TRUE, next_model=expected.prediction.step.model)
    else:
        _was_wrong(records, expected)


def tokenized(records: Records, request: RequestRecord) -> None:
    """Its prompt is known, and with it the step of its client's workflow."""
    step = Step(records.models[request.model].label, request.prefix)
    records.workflows.step(records.now, request.client, step, records.settings)


def finished(records: Records, request: RequestRecord) -> None:
    """Its KV is in its session, where the next prompt that begins like it finds it."""
    model = records.models.get(request.model)
    if model is not None and request.tokenized and request.session in records.sessions:
        step = Step(model.label, request.prefix)
        records.workflows.keep_session(step, request.session, records.settings)


def expire(records: Records) -> None:
    """Requests that did not come in time were wrong guesses. What nobody waits for any more is not fetched."""
    for client, expected in list(records.expected.items()):
        if records.now >= expected.until and expected.behind not in records.active:
            del records.expected[client]
            _was_wrong(records, expected)
    for model in records.models.values():
        if model.prefetched is not None and not _is_wanted(records, model.label):
            _give_up(records, model, Why.WRONG_GUESS)


def expires_at(records: Records) -> float | None:
    """When that is to be looked at; requests that still run are waited for."""
    ended = (e.until for e in records.expected.values() if e.behind not in records.active)
    return min(ended, default=None)


def _was_wrong(records: Records, expected: Expected) -> None:
    records.workflows.resolved(expected.prediction, hit=False)
    records.note(Why.WRONG_GUESS, next_model=expected.prediction.step.model)


def _is_wanted(records: Records, label: str) -> bool:
    """Whether somebody is expected to ask this model, or waits for it."""
    return any(e.prediction.step.model == label for e in records.expected.values()) or any(
        records.models[r.model].label == label for r in records.queue.values()
    )


def _give_up(records: Records, model: ModelRecord, why: Why) -> None:
    if model.prefetched is not None:
        records.workflows.totals.wasted += _fetched(model, model.prefetched)
        model.prefetched = None
        if model.refilling:
            reclaim.stop_loading(records, model, why)


def cancel_all(records: Records, why: Why) -> None:
    """Memory is wanted elsewhere: what was expected is not fetched."""
    records.expected.clear()
    for model in records.models.values():
        _give_up(records, model, why)


def _fetched(model: ModelRecord, prefetched: Prefetched) -> int:
    """Bytes of weights that are there now and were not before."""
    weights = model.weights
    missing = weights.missing + weights.bytes_in[SegmentState.LOADING]
    return max(min(prefetched.missing_bytes - missing, prefetched.asked_bytes), 0)


def started(records: Records, request: RequestRecord) -> int:
    """A request starts: how many bytes it finds because they were prefetched."""
    model = records.models[request.model]
    prefetched, model.prefetched = model.prefetched, None
    nbytes, saved_s = 0, 0.0
    if prefetched is not None:
        weights = _fetched(model, prefetched)
        nbytes = weights + prefetched.session_bytes
        missing = model.weights.missing + model.weights.bytes_in[SegmentState.LOADING]
        saved_s = max(
            records.waiting_s(model.name, missing + weights) - records.waiting_s(model.name, missing), 0.0
        )
    if request.expected is not None:
        prediction, request.expected = request.expected.prediction, None
        records.workflows.resolved(prediction, hit=True, nbytes=nbytes, saved_s=saved_s)
    return nbytes
