"""One request inside the secure process: what the Framework allows it, and what it asks for (engine.guide.Guide).

Two sides meet here: the runner, which hands over the Framework's effects and never waits, and the compute thread, which
waits. Knows nothing of models and channels.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ...core import Finished, Request
from ...engine.guide import Beginning, Step
from ...errors import FlexServeError
from ...framework import events as ev
from ...framework.order import Range

if TYPE_CHECKING:
    from ...engine.model_sessions import Match
    from .runner import Runner


class Run:
    """One request, from its arrival to its end."""

    def __init__(self, runner: Runner, request: Request, model: str, accepted_at: float) -> None:
        """`model`: the Framework's name of it."""
        self.request = request
        self.model = model
        self.accepted_at = accepted_at
        self.name = request.id
        self.session: str | None = None  # the Framework's name of the session that the client asked for
        self.streamed_bytes = 0
        self.prefetched_bytes = 0
        self.suspended_s = 0.0
        self.tokens = 0  # in its session, at the end
        self._runner = runner
        self._changed = threading.Condition()
        self._started = False
        self._cancelled = False
        self._beginning: Beginning | None = None
        self._granted = 0
        self._suspended = False
        self._end: FlexServeError | None = None
        self._finished = False  # ended by the Framework, as the client wished

    # The runner's side

    def start(self) -> None:
        """It is in the compute thread's queue."""
        self._change(lambda: setattr(self, "_started", True))

    @property
    def started(self) -> bool:
        return self._started

    @property
    def beginning(self) -> Beginning | None:
        """None before it computes."""
        return self._beginning

    def cancel(self) -> None:
        """The client went away."""
        self._change(lambda: setattr(self, "_cancelled", True))

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def compute(self, beginning: Beginning, kv_tokens: int) -> None:
        with self._changed:
            self._beginning, self._granted = beginning, kv_tokens
            self._changed.notify_all()

    def grant(self, kv_tokens: int) -> None:
        with self._changed:
            self._granted = kv_tokens
            self._changed.notify_all()

    def suspend(self) -> None:
        self._change(lambda: setattr(self, "_suspended", True))

    def resume(self, kv_tokens: int) -> None:
        with self._changed:
            self._suspended, self._granted = False, kv_tokens
            self._changed.notify_all()

    def end(self, error: FlexServeError | None) -> None:
        """None: it was cancelled."""
        with self._changed:
            self._end, self._finished = error, True
            self._changed.notify_all()

    def with_times(self, finished: Finished) -> Finished:
        """The answer, with what memory cost it."""
        timings = dataclasses.replace(
            finished.timings,
            streamed_bytes=self.streamed_bytes,
            suspended_s=self.suspended_s,
            prefetched_bytes=self.prefetched_bytes,
        )
        return dataclasses.replace(finished, timings=timings)

    def _change(self, change: Callable[[], None]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()

    # The compute thread's side

    def begin(self, prompt: Sequence[int], match: Match | None, rows: Sequence[Range]) -> Beginning | None:
        """See `Guide`."""
        session, source = self._runner.session_for(self, match)
        matched = match.cut if match is not None and source is not None else 0
        prefix = self._runner.prefix_of(self.model, prompt)
        event = ev.PromptTokenized(self.name, session, len(prompt), source, matched, tuple(rows), prefix)
        self._runner.post(event)
        with self._changed:
            self._changed.wait_for(lambda: self._beginning or self._over)
            self._raise_end()
            return None if self._over else self._beginning

    def before(self, tokens: int) -> Step:
        """See `Guide`."""
        with self._changed:
            if not (self._over or self._suspended) and tokens <= self._granted:
                return Step.GO
        if not (self._over or self._suspended):
            self._runner.post(ev.KvGrowing(self.name, tokens))
        with self._changed:
            self._changed.wait_for(lambda: tokens <= self._granted or self._suspended or self._over)
            self._raise_end()
            if self._over:
                return Step.CANCELLED
            return Step.PAUSE if self._suspended else Step.GO

    def first_token(self) -> None:
        """See `Guide`."""
        self._runner.post(ev.DecodeStarted(self.name))

    def paused(self, *, put_away: bool) -> Step:
        """See `Guide`."""
        began = time.perf_counter()
        assert self._beginning is not None
        self._runner.put_away(self._beginning.session, done=put_away)
        self._runner.post(ev.RequestPaused(self.name))
        with self._changed:
            self._changed.wait_for(lambda: not self._suspended or self._over)
            self.suspended_s += time.perf_counter() - began
            self._raise_end()
            return Step.CANCELLED if self._over else Step.GO

    def kept(self, tokens: int) -> None:
        """See `Guide`."""
        self.tokens = tokens

    @property
    def _over(self) -> bool:
        return self._cancelled or self._finished

    def _raise_end(self) -> None:
        if self._end is not None:
            raise self._end
