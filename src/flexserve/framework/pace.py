"""How fast weights are loaded and prompts computed, as measured from events; what switching to a model costs.

Knows times and bytes. Does not know what is loaded, nor why.
"""

from __future__ import annotations

from dataclasses import dataclass

SAMPLE_BYTES = 8 << 20  # fewer say more about reporting than about loading
FIRST_GUESS = float(1 << 30)  # bytes per second, until something was loaded
NEWEST = 0.25  # what the newest sample counts


@dataclass
class LoadPace:
    """Bytes per second, while anything is on its way."""

    bytes_per_s: float = FIRST_GUESS
    measured: bool = False
    _since: float | None = None
    _nbytes: int = 0

    def tell(self, now: float, placed: int, *, loading: bool) -> None:
        """`placed` bytes came since the last call; `loading`: more are on their way."""
        if self._since is not None:
            self._nbytes += placed
            took = now - self._since
            if self._nbytes >= SAMPLE_BYTES and took > 0:
                sample = self._nbytes / took
                self.bytes_per_s += (NEWEST if self.measured else 1.0) * (sample - self.bytes_per_s)
                self.measured = True
                self._since, self._nbytes = now, 0
        if not loading:
            self._since, self._nbytes = None, 0
        elif self._since is None:
            self._since = now

    def seconds(self, nbytes: int) -> float:
        return nbytes / self.bytes_per_s


@dataclass
class PromptPace:
    """Seconds for each token of a prompt of one model, computed with all weights in memory."""

    s_per_token: float = 0.0  # unknown: compute hides nothing
    _began: float | None = None
    _tokens: int = 0

    def begin(self, now: float, tokens: int, *, resident: bool) -> None:
        """A prompt of which `tokens` are computed; `resident`: it waits for no weights."""
        self._began, self._tokens = (now if resident and tokens > 0 else None), tokens

    def end(self, now: float) -> None:
        """Its first token is there."""
        if self._began is not None:
            sample = (now - self._began) / self._tokens
            self.s_per_token += (NEWEST if self.s_per_token else 1.0) * (sample - self.s_per_token)
        self._began = None


def waiting_s(load: LoadPace, prompt: PromptPace, missing_bytes: int, typical_tokens: float) -> float:
    """How long a request of a model waits for weights: loading them, less what computing hides of it."""
    return max(load.seconds(missing_bytes) - prompt.s_per_token * typical_tokens, 0.0)
