"""Dynamic caching: the best distribution of the budget over models and sessions (paper, section 5).

A pure function of counts and sizes. Does not know what is resident, nor how to get there (background.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .settings import Settings


@dataclass(frozen=True)
class ModelUse:
    """What caching looks at, of one model. `weight_bytes`: of the parts that requests load."""

    model: str
    weight_bytes: int
    recent: int  # invocations in the last hour
    frequency: float  # invocations ever, older ones counting less
    typical_prompt_tokens: float
    last_used: float


@dataclass(frozen=True)
class SessionUse:
    """An idle session in memory."""

    session: str
    model: str
    nbytes: int
    last_used: float


@dataclass(frozen=True)
class Share:
    """What one model should hold: a prefix of its weights and some sessions."""

    model: str
    rate: float  # of all invocations of the last hour
    score: float
    kept: bool
    budget_bytes: int
    prefix_bytes: int
    sessions: tuple[str, ...]


@dataclass(frozen=True)
class Distribution:
    """The best distribution. `shares`: most invoked model first."""

    shares: tuple[Share, ...]

    @property
    def prefix_bytes(self) -> Mapping[str, int]:
        return {share.model: share.prefix_bytes for share in self.shares}

    @property
    def sessions(self) -> frozenset[str]:
        return frozenset(session for share in self.shares for session in share.sessions)


def rank(models: Iterable[ModelUse]) -> list[ModelUse]:
    """Most invoked first: by the last hour, then ever, then last use; names decide the rest."""
    return sorted(models, key=lambda m: (-m.recent, -m.frequency, -m.last_used, m.model))


def distribute(
    budget_bytes: int,
    models: Iterable[ModelUse],
    sessions: Sequence[SessionUse],
    now: float,
    settings: Settings,
) -> Distribution:
    """Who may hold how much of `budget_bytes`.

    Kept are the models with more than `rate_threshold` of the last hour's invocations, or the `top_models`
    if none has that many; a model that was never invoked is not. The budget is divided by score; what a
    model cannot use goes to the others. The paper gives the directions (more with rate and frequency, less
    with long prompts) and no formula; ours is

        score = (rate + frequency_weight * frequency's share) * reference / (reference + typical prompt)
    """
    ranked = rank(models)
    recent, frequency = sum(m.recent for m in ranked), sum(m.frequency for m in ranked)
    rates = {m.model: m.recent / recent if recent else 0.0 for m in ranked}
    kept = [m for m in ranked if rates[m.model] > settings.rate_threshold]
    if not kept:
        kept = [m for m in ranked if m.recent or m.frequency][: settings.top_models]
    reference = settings.prompt_reference_tokens
    scores = {
        m.model: (
            rates[m.model] + settings.frequency_weight * (m.frequency / frequency if frequency else 0.0)
        )
        * reference
        / (reference + m.typical_prompt_tokens)
        for m in kept
    }
    candidates: dict[str, list[SessionUse]] = {m.model: [] for m in kept}
    for session in sorted(sessions, key=lambda s: (-s.last_used, s.session)):
        if session.model in candidates and now - session.last_used <= settings.session_recent_s:
            candidates[session.model].append(session)
    most = {m.model: m.weight_bytes + sum(s.nbytes for s in candidates[m.model]) for m in kept}
    budgets = divide(budget_bytes, scores, most)
    shares = []
    for model in ranked:
        own, chosen, prefix = budgets.get(model.model, 0), [], 0
        if model.model in scores:
            # Sessions take their share, and beyond it only what the weights leave.
            allowed = max(int(own * settings.session_share), own - model.weight_bytes)
            for session in candidates[model.model]:
                if session.nbytes <= allowed:
                    allowed -= session.nbytes
                    chosen.append(session)
            prefix = min(own - sum(s.nbytes for s in chosen), model.weight_bytes)
        shares.append(
            Share(
                model.model,
                rates[model.model],
                scores.get(model.model, 0.0),
                model.model in scores,
                own,
                prefix,
                tuple(s.session for s in chosen),
            )
        )
    return Distribution(tuple(shares))


def divide(total: int, scores: Mapping[str, float], most: Mapping[str, int]) -> dict[str, int]:
    """`total` in proportion to the scores, nobody more than `most`; what one cannot take goes to the rest."""
    given: dict[str, int] = {}
    left, open_scores = max(total, 0), dict(scores)
    while open_scores:
        whole = sum(open_scores.values())
        shares = {
            name: int(left * score / whole) if whole else left // len(open_scores)
            for name, score in open_scores.items()
        }
        full = [name for name in open_scores if shares[name] >= most[name]]
        if not full:
            return given | shares
        for name in full:
            given[name] = most[name]
            left -= most[name]
            del open_scores[name]
    return given
