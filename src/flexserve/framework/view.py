"""What the Framework knows right now, for people. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from . import background
from .records import Records
from .tables import SegmentState, SessionState


@dataclass(frozen=True)
class ModelView:
    """One model, as `flexserve ps` shows it. Sizes in bytes."""

    model: str
    state: str
    size: int
    resident: int  # firm and lazy
    lazy: int
    loading: int
    fixed: int  # besides weights and sessions
    prefix: int  # without a gap, from the beginning
    budget: int  # of the best distribution
    rate: float  # share of the last hour's invocations
    streamed: int  # for every token; 0: the model fits
    least: int  # budget with which it answers a short prompt
    pinned: bool
    sessions: int  # in memory
    session_bytes: int
    last_used_s_ago: float | None


@dataclass(frozen=True)
class View:
    """The whole, right now. Sizes in bytes."""

    budget: int
    cap: int
    floor: int
    held: int
    leaving: int
    fixed: int  # of what is held, what no recall takes
    wanted: int  # that requests could use more
    queued: int
    active: int
    sessions_stored: int
    models: tuple[ModelView, ...]


def view_of(records: Records) -> View:
    """A snapshot."""
    shares = {share.model: share for share in background.best_distribution(records).shares}
    models = []
    for model in records.models.values():
        share, by = shares.get(model.name), model.weights.bytes_in
        sessions = [s for s in records.in_memory.values() if s.model == model.name]
        used = model.usage.last_used
        models.append(
            ModelView(
                model=model.name,
                state=model.state.value,
                size=model.weights.size,
                resident=model.weights.present,
                lazy=by[SegmentState.LAZY],
                loading=by[SegmentState.LOADING],
                fixed=model.fixed_bytes,
                prefix=model.weights.prefix(),
                budget=share.budget_bytes if share else 0,
                rate=share.rate if share else 0.0,
                streamed=model.streamed_bytes if model.active else 0,
                least=records.least(model),
                pinned=records.is_pinned(model),
                sessions=len(sessions),
                session_bytes=sum(s.nbytes for s in sessions),
                last_used_s_ago=None if used < 0 else records.now - used,
            )
        )
    return View(
        budget=records.budget,
        cap=records.settings.cap_bytes,
        floor=records.settings.floor_bytes,
        held=records.ledger.held,
        leaving=records.ledger.leaving,
        fixed=records.fixed_bytes,
        wanted=records.asked_bytes if records.active else 0,
        queued=records.waiting,
        active=len(records.active),
        sessions_stored=sum(s.state == SessionState.STORED for s in records.sessions.values()),
        models=tuple(models),
    )
