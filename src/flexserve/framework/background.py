"""What is done while nobody waits: stage 2 of reclamation, early saves, the lazy hand-over, storage's limit.

*Stage 2* restores the best distribution of `caching.py` step by step: it loads what is missing from a model's
prefix, and takes for it what is beyond anyone's share. *Asynchronous swapping*: an idle session is encrypted
and written early, so that its memory is as cheap to take as weights (paper, section 5).
"""

from __future__ import annotations

from . import reclaim
from .caching import Distribution, distribute
from .effects import ForgetSession, HandLazily, LoadRange, Priority, Why
from .reclaim import Keep, Stage
from .records import Records, SessionRecord
from .tables import ModelState, RequestState, SegmentState, SegmentTrigger, SessionState, SessionTrigger

IDLE_SESSIONS = (Stage.SAVED_SESSIONS, Stage.UNSAVED_SESSIONS)
SURPLUS = (Stage.SAVED_SESSIONS, Stage.IDLE_WEIGHTS, Stage.UNSAVED_SESSIONS)


def best_distribution(records: Records) -> Distribution:
    """Of the budget, without what requests use right now."""
    budget = max(records.budget - records.in_use(), 0)
    return distribute(budget, records.model_uses(), records.session_uses(), records.now, records.settings)


def work(records: Records, *, only_refill: bool = False, refill: bool = True) -> None:
    """One step of each kind of background work that is due. `only_refill`: nothing but stage 2 can have become so.
    `refill` off: no stage 2, because a request is expected."""
    computing = (RequestState.PREPARING, RequestState.RUNNING)
    if not only_refill and not any(r.state in computing for r in records.active.values()):
        save_early(records)
    # One that waits for memory is waited for: what is loaded now would be taken for it at once.
    if refill and not records.active and calm_at(records) <= records.now:
        restore_distribution(records)
    if only_refill:
        return
    hand_lazily(records)
    limit_sessions(records)
    limit_storage(records)


def calm_at(records: Records) -> float:
    """When the last pressure is long enough ago."""
    return 0.0 if records.pressed_at is None else records.pressed_at + records.settings.calm_s


def save_early(records: Records) -> None:
    """Save the session that has been idle longest, if that is long."""
    sessions = list(records.in_memory.values())
    under_way = sum(s.state == SessionState.SAVING for s in sessions)
    due = [s for s in sessions if (at := save_at(records, s)) is not None and at <= records.now]
    room = max(records.settings.saves_at_once - under_way, 0)
    for session in sorted(due, key=lambda s: (s.last_used, s.name))[:room]:
        reclaim.save(records, session, Why.SAVE_EARLY)


def save_at(records: Records, session: SessionRecord) -> float | None:
    """When an idle, unsaved session is to be saved; None for the others."""
    if not records.settings.saves or session.state != SessionState.RESIDENT or session.readers:
        return None
    return max(session.last_used + records.settings.save_after_s, session.retry_at)


def hand_lazily(records: Records) -> None:
    """Weights nobody is using may be taken by the kernel without a call."""
    for model in records.models.values():
        at = lazy_at(records, model.name)
        if at is not None and at <= records.now:
            firm = model.weights.in_state(SegmentState.RESIDENT)
            nbytes = records.move_segments(model, SegmentTrigger.HAND, firm)
            records.do(HandLazily(model.name, model.weights.ranges(firm)), Why.NOBODY_USES_IT, nbytes=nbytes)


def lazy_at(records: Records, name: str) -> float | None:
    """When a model's firm weights are to be handed over; None when there are none, or it is in use."""
    model = records.models[name]
    if not records.settings.lazy or model.active or not model.weights.bytes_in[SegmentState.RESIDENT]:
        return None
    if records.is_pinned(model):  # the kernel knows no order
        return None
    if model.state == ModelState.CLOSING:  # all of it is being given back
        return None
    if model.weights.bytes_in[SegmentState.LOADING] or model.prefetched is not None:
        return None
    return model.usage.last_used + records.settings.lazy_after_s


def restore_distribution(records: Records) -> None:
    """Stage 2, one step: the most invoked model that lacks a part of its prefix gets the next piece of it."""
    ahead = records.settings.refill_ahead_bytes - records.ledger.loading
    if ahead < records.settings.refill_ahead_bytes // 2 or not any(
        model.weights.missing for model in records.models.values()
    ):
        return
    best = records.distribution = best_distribution(records)
    keep = Keep({**best.prefix_bytes, **records.pinned_bytes()}, best.sessions)
    for share in best.shares:
        model = records.models[share.model]
        weights = model.weights
        # One that nobody invoked for an hour waits until somebody does.
        if not share.rate or not share.prefix_bytes or model.stopping or model.state != ModelState.READY:
            continue
        goal = weights.forward(weights.fill_from, share.prefix_bytes)
        wanted = min(ahead, weights.absent_bytes(weights.fill_from, goal))
        if not wanted:
            continue
        reclaim.make_room(records, wanted, SURPLUS, keep=keep, spare=model.name, why=Why.BEST_DISTRIBUTION)
        absent = weights.absent(weights.fill_from, goal, min(wanted, max(records.free, 0)))
        if absent:
            records.move_segments(model, SegmentTrigger.LOAD, absent)
            model.refilling = True
            model.planned = True
            records.do(
                LoadRange(model.name, weights.ranges(absent), Priority.REFILL),
                Why.BEST_DISTRIBUTION,
                rate=round(share.rate, 6),
                prefix=share.prefix_bytes,
                free=records.free,
            )
        return


def limit_sessions(records: Records) -> None:
    """Idle sessions take their share of memory and no more, and there are not more of them than there may be."""
    if len(records.sessions) > records.settings.session_limit:
        _forget_one(records)
    idle = records.session_uses()
    over = sum(s.nbytes for s in idle) - records.settings.session_limit_bytes
    if over > 0:
        reclaim.take(records, reclaim.choose(records, over, IDLE_SESSIONS))


def _forget_one(records: Records) -> None:
    ended = (SessionState.STORED, SessionState.SAVED, SessionState.RESIDENT)
    idle = [s for s in records.sessions.values() if s.state in ended and s.owner is None and not s.readers]
    if not idle:
        return
    oldest = min(idle, key=lambda s: (s.last_used, s.name))
    if oldest.state == SessionState.STORED:
        records.move_session(oldest, SessionTrigger.FORGET)
        records.do(ForgetSession(oldest.name), Why.STORAGE_FULL, nbytes=oldest.nbytes)
    elif oldest.state == SessionState.SAVED:
        reclaim.drop(records, oldest, Why.STORAGE_FULL)
    else:
        reclaim.discard(records, oldest, Why.STORAGE_FULL)


def limit_storage(records: Records) -> None:
    """Forget the oldest saved sessions when they take more than storage may."""
    limit = records.settings.stored_limit_bytes
    if records.stored_bytes <= limit:
        return
    stored = [s for s in records.sessions.values() if s.state == SessionState.STORED and s.owner is None]
    for session in sorted(stored, key=lambda s: (s.last_used, s.name)):
        if records.stored_bytes <= limit:
            return
        records.move_session(session, SessionTrigger.FORGET)
        records.do(ForgetSession(session.name), Why.STORAGE_FULL, nbytes=session.nbytes)
