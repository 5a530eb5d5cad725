"""One model's segments: where each is, and what that costs.

Knows the order in which compute needs them (*positions*, counted from 0) and each one's state. Does not know
why a state changes. The states are one byte each, so that runs are found at memory speed: a decision over
20 models of 10,000 segments takes well under a millisecond.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .order import Range
from .tables import SEGMENT, SEGMENT_HELD, SegmentState, SegmentTrigger, after

Span = tuple[int, int]  # positions: first, and one behind the last

_RUN = re.compile(rb"(.)\1*", re.DOTALL)
_ABSENT_RUN = re.compile(b"%c+" % SegmentState.ABSENT)
_HELD = bytes(state in SEGMENT_HELD for state in SegmentState)


@dataclass(frozen=True)
class Part:
    """Consecutive segments of one size: `count` from index `first`, `nbytes` in all (the last may be shorter).

    `fill`: whether a request loads all of it. The embedding of an untied model is not filled: its rows are
    fetched when compute touches them. Parts that are not filled come first.
    """

    first: int
    count: int
    unit_bytes: int
    nbytes: int
    fill: bool = True

    def __post_init__(self) -> None:
        if (
            self.count < 1
            or not (self.count - 1) * self.unit_bytes < self.nbytes <= self.count * self.unit_bytes
        ):
            raise ValueError(f"{self.count} segments of {self.unit_bytes} bytes are not {self.nbytes} bytes")


@dataclass
class Ledger:
    """Sums over all models and sessions, in bytes. Kept up to date by whoever changes a state."""

    held: int = 0  # counts against the budget: on its way, in memory, or not yet given back
    loading: int = 0  # of it: room taken by weights on their way and sessions being restored
    leaving: int = 0  # of it: chosen to go
    freed: int = 0  # given back since the start
    leaving_kv: int = 0  # of what leaves: sessions, which may have to be saved first
    freed_kv: int = 0  # of what was given back: sessions


class Weights:
    """The states of one model's segments. Positions are in execution order."""

    def __init__(self, parts: Iterable[Part], ledger: Ledger) -> None:
        self.parts = tuple(parts)
        self.count = sum(p.count for p in self.parts)
        self.size = sum(p.nbytes for p in self.parts)
        if not self.parts or [p.fill for p in self.parts] != sorted(p.fill for p in self.parts):
            raise ValueError("a model has parts, and those that are not filled come first")
        self.fill_from = sum(p.count for p in self.parts if not p.fill)
        self.fill_size = sum(p.nbytes for p in self.parts if p.fill)
        self.bytes_in = dict.fromkeys(SegmentState, 0)
        self.bytes_in[SegmentState.ABSENT] = self.size
        self.missing = self.fill_size  # bytes that are absent, of those a request loads
        self._ledger = ledger
        self._states = bytearray(self.count)

    # Geometry

    def nbytes(self, start: int, end: int) -> int:
        """Bytes of the positions from `start` up to `end`."""
        total = at = 0
        for part in self.parts:
            low, high = max(start - at, 0), min(end - at, part.count)
            if low < high:
                total += (high - low) * part.unit_bytes
                if high == part.count:
                    total -= part.count * part.unit_bytes - part.nbytes
            at += part.count
        return total

    def forward(self, start: int, nbytes: int) -> int:
        """The farthest position such that everything from `start` up to it fits in `nbytes`."""
        at = 0
        for part in self.parts:
            low = max(start - at, 0)
            if low < part.count:
                whole = part.nbytes - low * part.unit_bytes
                if whole > nbytes:
                    return at + low + max(nbytes, 0) // part.unit_bytes
                nbytes -= whole
            at += part.count
        return self.count

    def backward(self, end: int, nbytes: int) -> int:
        """The nearest position such that everything from it up to `end` is at least `nbytes`; 0 if too few."""
        at = self.count
        for part in reversed(self.parts):
            at -= part.count
            high = min(end - at, part.count)
            if high <= 0:
                continue
            short = part.count * part.unit_bytes - part.nbytes if high == part.count else 0
            if high * part.unit_bytes - short >= nbytes:
                return at + min(high, high - -(-(nbytes + short) // part.unit_bytes)) if nbytes > 0 else end
            nbytes -= high * part.unit_bytes - short
        return 0

    def position(self, index: int) -> int:
        """The position of a segment. Raises `IndexError`."""
        return self._place(index)[0]

    def _place(self, index: int) -> tuple[int, int]:
        """The position of a segment, and how many of its part begin there."""
        at = 0
        for part in self.parts:
            if 0 <= index - part.first < part.count:
                return at + index - part.first, part.count - (index - part.first)
            at += part.count
        raise IndexError(f"the model has no segment {index}")

    def ranges(self, spans: Iterable[Span]) -> tuple[Range, ...]:
        """Spans of positions as ranges of segment indices, in the same order."""
        made: list[Range] = []
        for start, end in spans:
            at = 0
            for part in self.parts:
                low, high = max(start - at, 0), min(end - at, part.count)
                if low < high:
                    made.append(Range(part.first + low, high - low))
                at += part.count
        return tuple(made)

    def spans(self, ranges: Iterable[Range]) -> Iterator[Span]:
        """Ranges of segment indices as spans, one for each part that a range touches. Raises `IndexError` for a
        segment that the model does not have."""
        for one in ranges:
            index, left = one.first, one.count
            if left < 1:
                raise IndexError(f"{left} segments from {index} are no range")
            while left:
                start, room = self._place(index)
                count = min(left, room)
                yield start, start + count
                index, left = index + count, left - count

    # States

    def state(self, position: int) -> SegmentState:
        return SegmentState(self._states[position])

    def prefix(self) -> int:
        """How many bytes of the filled parts are there, without a gap, from their beginning."""
        end = self._states.find(SegmentState.ABSENT, self.fill_from)
        return self.nbytes(self.fill_from, self.count if end < 0 else end)

    @property
    def present(self) -> int:
        """Bytes that may be taken: firm or lazy."""
        return self.bytes_in[SegmentState.RESIDENT] + self.bytes_in[SegmentState.LAZY]

    def apply(self, trigger: SegmentTrigger, spans: Iterable[Span]) -> int:
        """Take one step in the table for every position; returns the bytes that changed. Raises `Impossible`."""
        changed = 0
        for start, end in spans:
            for run in list(_RUN.finditer(self._states, start, end)):
                old = SegmentState(run.group()[0])
                new = after(SEGMENT, old, trigger)
                if new != old:
                    changed += self._set(run.start(), run.end(), old, new)
        return changed

    def _set(self, start: int, end: int, old: SegmentState, new: SegmentState) -> int:
        nbytes = self.nbytes(start, end)
        self._states[start:end] = bytes([new]) * (end - start)
        self.bytes_in[old] -= nbytes
        self.bytes_in[new] += nbytes
        absent = (new == SegmentState.ABSENT) - (old == SegmentState.ABSENT)
        if absent and end > self.fill_from:
            self.missing += absent * self.nbytes(max(start, self.fill_from), end)
        ledger = self._ledger
        ledger.held += nbytes * (_HELD[new] - _HELD[old])
        ledger.loading += nbytes * ((new == SegmentState.LOADING) - (old == SegmentState.LOADING))
        ledger.leaving += nbytes * ((new == SegmentState.CLAIMED) - (old == SegmentState.CLAIMED))
        if new == SegmentState.ABSENT and old != SegmentState.LOADING:
            ledger.freed += nbytes
        return nbytes

    def forget(self) -> None:
        """The model is closed: nothing of it is held any more."""
        for state in SegmentState:
            if state != SegmentState.ABSENT and self.bytes_in[state]:
                for run in list(re.finditer(b"%c+" % state, self._states)):
                    self._set(run.start(), run.end(), state, SegmentState.ABSENT)

    # Choosing

    def in_state(self, state: SegmentState) -> list[Span]:
        """All runs of one state."""
        return [run.span() for run in re.finditer(re.escape(b"%c" % state) + b"+", self._states)]

    def absent(self, start: int, end: int, nbytes: int) -> list[Span]:
        """Runs of absent segments in [start, end), from its beginning, of at most `nbytes` in all."""
        found: list[Span] = []
        for run in _ABSENT_RUN.finditer(self._states, start, end):
            first, last = run.span()
            if self.nbytes(first, last) > nbytes:
                last = self.forward(first, nbytes)
                if last > first:
                    found.append((first, last))
                break
            nbytes -= self.nbytes(first, last)
            found.append((first, last))
        return found

    def tail(self, start: int, end: int, nbytes: int) -> list[Span]:
        """Runs that may be taken in [start, end), from its end: `nbytes` or a little more, or all there are."""
        found: list[Span] = []
        rfind, at = self._states.rfind, end
        while nbytes > 0 and at > start:
            last = max(rfind(SegmentState.RESIDENT, start, at), rfind(SegmentState.LAZY, start, at))
            if last < 0:
                break
            first = 1 + max(
                rfind(SegmentState.ABSENT, start, last),
                rfind(SegmentState.LOADING, start, last),
                rfind(SegmentState.CLAIMED, start, last),
                start - 1,
            )
            size = self.nbytes(first, last + 1)
            if size > nbytes:
                first = self.backward(last + 1, nbytes)
                size = nbytes
            found.append((first, last + 1))
            nbytes -= size
            at = first
        return found

    def check(self) -> None:
        """Our own invariant: the sums are those of the states. Raises `AssertionError`."""
        for state in SegmentState:
            spans = self.in_state(state)
            assert self.bytes_in[state] == sum(self.nbytes(a, b) for a, b in spans), state
        absent = self.in_state(SegmentState.ABSENT)
        assert self.missing == sum(
            self.nbytes(max(a, self.fill_from), max(b, self.fill_from)) for a, b in absent
        )
