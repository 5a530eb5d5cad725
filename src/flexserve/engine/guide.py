"""Who decides what one answer may use, and when: what the compute thread asks at an answer's turning points.

The world's implementation asks the Framework. Without a guide an answer uses everything at once (model.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from ..framework.order import Range
from .model_sessions import Match


class Step(Enum):
    """How an answer goes on."""

    GO = "go"
    PAUSE = "pause"  # put the keys and values away, and call `paused`
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Beginning:
    """`session` gets the KV of this answer; its first `reuse_tokens` are those of `source`."""

    session: str
    source: str | None
    reuse_tokens: int


class Guide(Protocol):
    """Called by the thread that computes the answer. Each may wait, and raises what ends the answer."""

    def begin(self, prompt: Sequence[int], match: Match | None, rows: Sequence[Range]) -> Beginning | None:
        """The prompt is tokens now. `rows`: segments of its embedding rows. None: it was cancelled."""

    def before(self, tokens: int) -> Step:
        """The next decode makes the context hold so many tokens."""

    def first_token(self) -> None:
        """The prompt is computed; the session it went on from is not read any more."""

    def paused(self, *, put_away: bool) -> Step:
        """Wait until the answer may go on. `put_away`: its KV is a session in the store now; else it is where it was.
        After GO that session is in memory."""

    def kept(self, tokens: int) -> None:
        """So many tokens of the answer's KV are in its session now, for those who come later."""
