"""How often each model is invoked, and with how long a prompt (paper, section 5: the invocation log).

Counts only: no prompt, no session, no order. The log of workflows is another module's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from .settings import Settings

BUCKETS = 60  # the window of the rate moves in this many steps
PROMPT_WEIGHT = 0.125  # of the newest prompt in the typical length


@dataclass
class Usage:
    """One model's invocations."""

    last_used: float = -1.0  # time of the last arrival or end; -1: never
    typical_prompt_tokens: float = 0.0
    _prompts: int = 0
    _recent: deque[list[int]] = field(default_factory=deque)  # [step, invocations]
    _frequency: float = 0.0  # decayed count at `_frequency_at`
    _frequency_at: float = 0.0

    def invoked(self, now: float, settings: Settings) -> None:
        """A request for this model arrived."""
        step = bucket(now, settings)
        if self._recent and self._recent[-1][0] == step:
            self._recent[-1][1] += 1
        else:
            self._recent.append([step, 1])
        self._frequency = self.frequency(now, settings) + 1.0
        self._frequency_at = now
        self.last_used = now

    def prompted(self, tokens: int) -> None:
        """The length of a prompt became known."""
        self._prompts += 1
        weight = max(PROMPT_WEIGHT, 1 / self._prompts)
        self.typical_prompt_tokens += weight * (tokens - self.typical_prompt_tokens)

    def recent(self, now: float, settings: Settings) -> int:
        """Invocations in the last hour (`rate_window_s`, to the sixtieth of it)."""
        oldest = bucket(now, settings) - BUCKETS
        while self._recent and self._recent[0][0] <= oldest:
            self._recent.popleft()
        return sum(count for _, count in self._recent)

    def frequency(self, now: float, settings: Settings) -> float:
        """Invocations ever, each counting half after `frequency_half_life_s`."""
        age = (now - self._frequency_at) / settings.frequency_half_life_s
        return float(self._frequency * 0.5**age)


def bucket(now: float, settings: Settings) -> int:
    """The step of the rate's window that a time is in."""
    return int(now * BUCKETS // settings.rate_window_s)
