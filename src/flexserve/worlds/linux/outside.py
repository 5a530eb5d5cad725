"""What surrounds the runner: who hears from it, and what it hears from a model's loader.

Knows names and events; decides nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import TYPE_CHECKING

from ...errors import FlexServeError
from ...flexmem.arena import Change
from ...framework import events as ev
from ...framework.order import Range

if TYPE_CHECKING:
    from .run import Run
    from .runner import Runner

FIRST_SEGMENTS = 16  # of a recall: the first bytes go at once, the others in larger pieces
MORE_SEGMENTS = 1024


class Outside:
    """What the runner tells the rest of the process. Called on any thread, and never waited for."""

    def compute(self, run: Run) -> None:
        """This request's turn: answer it on the compute thread."""

    def ended(self, run: Run, error: FlexServeError | None) -> None:
        """A request that never computed has ended; None: its client had gone."""

    def answered(self, call: int, chosen_bytes: int, later_bytes: int) -> None:
        """A recall's bytes are chosen."""

    def began(self, call: int) -> None:
        """The first of them are back."""

    def finished(self, call: int, freed_bytes: int) -> None:
        """All of them are."""

    def closed(self, name: str) -> None:
        """A model is closed: its files are not read any more."""

    def fails(self) -> None:
        """A mistake of ours: nothing would go on any more."""


class ModelListener:
    """What one model's loader reports (`flexmem.loader.Listener`)."""

    def __init__(self, runner: Runner, name: str) -> None:
        self._runner = runner
        self.name = name
        self._latest: int | None = None  # where compute waits, not told yet

    def changed(self) -> None:
        self._runner.report(self.name)

    def computes_at(self, segment: int) -> None:
        """On the fault handler's thread, which must not be kept: the clock thread tells it."""
        told, self._latest = self._latest is not None, segment
        if not told:
            self._runner.post_later(self._tell)

    def _tell(self) -> None:
        segment, self._latest = self._latest, None
        if segment is not None:
            self._runner.post(ev.ComputeAt(self.name, segment))

    def poisoned(self, error: FlexServeError) -> None:
        self._runner.post(ev.ModelPoisoned(self.name, error.code, error.message))


def session_name(model: str, session: str) -> str:
    """The Framework's name of a client's session: the trace repeats no client's words."""
    return f"{model}/c{sha256(session.encode()).hexdigest()[:16]}"


def pieces(ranges: Iterable[Range]) -> Iterator[list[int]]:
    """Segments in small pieces first."""
    size, piece = FIRST_SEGMENTS, []
    for one in ranges:
        for index in range(one.first, one.first + one.count):
            piece.append(index)
            if len(piece) == size:
                yield piece
                size, piece = MORE_SEGMENTS, []
    if piece:
        yield piece


def changes(name: str, journal: Iterable[Change]) -> Iterator[ev.SegmentsChanged]:
    """What an arena noted, as events; what happened alike and in a row is one."""
    for what, alike in itertools.groupby(journal, lambda change: change.what):
        yield ev.SegmentsChanged(name, what, tuple(Range(c.first, c.count) for c in alike))
