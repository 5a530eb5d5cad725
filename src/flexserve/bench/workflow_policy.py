"""Which whole models are in memory: what others do, and FlexServe is measured against. Pure.

    load_per_request  nothing stays in memory after an answer
    keep_all          everything stays
    lru               whole models stay, the least recently used goes where another one needs its room (llama-swap)
    timer             the same, and what was not used for five minutes goes by itself (Ollama, LM Studio)

Knows sizes and times; neither processes nor worlds.
"""

from __future__ import annotations

from collections.abc import Mapping

WHOLE_MODELS = ("load_per_request", "keep_all", "timer", "lru")
TIMER_S = 300.0


class WholeModels:
    """The models that are in memory under one policy. Whoever asks does what it says, at once."""

    def __init__(
        self, policy: str, sizes: Mapping[str, int], budget_bytes: int, timer_s: float = TIMER_S
    ) -> None:
        """`sizes`: of each model's weights, in bytes. It must be one of WHOLE_MODELS, and `refusal` empty."""
        assert policy in WHOLE_MODELS
        assert not refusal(policy, sizes, budget_bytes)
        self._policy, self._sizes, self._budget, self._timer_s = policy, dict(sizes), budget_bytes, timer_s
        self._used_at: dict[str, float] = {}  # the least recently used first

    @property
    def resident(self) -> tuple[str, ...]:
        """The least recently used first."""
        return tuple(self._used_at)

    @property
    def held_bytes(self) -> int:
        return sum(self._sizes[name] for name in self._used_at)

    def expired(self, now: float) -> list[str]:
        """What the timer has dropped until now (seconds)."""
        if self._policy != "timer":
            return []
        return self._drop([name for name, at in self._used_at.items() if now - at >= self._timer_s])

    def needed(self, model: str, now: float) -> list[str]:
        """A request for `model` comes: what goes first, to make room for all of it."""
        gone = []
        at = self._used_at.pop(model, None)
        while self.held_bytes + self._sizes[model] > self._budget:
            gone += self._drop([next(iter(self._used_at))])
        self._used_at[model] = now if at is None else max(at, now)
        return gone

    def answered(self, model: str, now: float) -> list[str]:
        """The answer is over: what goes now."""
        del self._used_at[model]
        self._used_at[model] = now
        return self._drop([model]) if self._policy == "load_per_request" else []

    def everything(self) -> list[str]:
        """Drop all there is."""
        return self._drop(list(self._used_at))

    def _drop(self, names: list[str]) -> list[str]:
        for name in names:
            del self._used_at[name]
        return names


def refusal(policy: str, sizes: Mapping[str, int], budget_bytes: int) -> str:
    """Why a policy is not possible within a budget; empty: it is."""
    largest = max(sizes, key=lambda name: sizes[name])
    if sizes[largest] > budget_bytes:
        return f"model {largest} of {_gb(sizes[largest])} does not fit the budget of {_gb(budget_bytes)}"
    if policy == "keep_all" and (total := sum(sizes.values())) > budget_bytes:
        return f"all models together take {_gb(total)}, the budget is {_gb(budget_bytes)}"
    return ""


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
