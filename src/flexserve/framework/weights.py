"""One model's segments: where each is, and what that costs.

Knows the order in which compute needs them (*positions*, counted from 0) and each one's state. Does not know
why a state changes. The states are one byte each, and so are the sets of positions that a step is taken for
(positions.py), so that a step costs the same however scattered they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .order import Range, Ranges
from .positions import NONE, Positions, Span
from .tables import SEGMENT, SEGMENT_HELD, SegmentState, SegmentTrigger, after

FEW = 64  # ranges that are made at once; of more of them whoever carries out the effect makes them

_HELD = bytes(state in SEGMENT_HELD for state in SegmentState)
_CHOSEN = 8  # added to the state of a position that takes a step; there are fewer states than that


def _marking(*states: SegmentState) -> bytes:
    """For `bytes.translate`: 1 for these states, 0 for the others."""
    return bytes(code in states for code in range(256))


def _stepping(trigger: SegmentTrigger) -> bytes:
    """For `bytes.translate`: a chosen position's state becomes the next one, the others' stay."""
    table = bytearray(range(256))
    for state in SegmentState:
        table[_CHOSEN | state] = SEGMENT.get((state, trigger), state)
    return bytes(table)


_MARK = {state: _marking(state) for state in SegmentState}
_TAKING = {state: bytes(code == _CHOSEN | state for code in range(256)) for state in SegmentState}
_MARK_PRESENT = _marking(SegmentState.RESIDENT, SegmentState.LAZY)
_STEP = {trigger: _stepping(trigger) for trigger in SegmentTrigger}


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
        self.largest = max(
            (p.unit_bytes for p in self.parts if p.fill), default=0
        )  # segment of the filled parts
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

    def _within(self, start: int, end: int) -> Iterator[tuple[Part, int, int, int]]:
        """The parts that [start, end) touches: a part, the position it begins at, and what it has of them."""
        at = 0
        for part in self.parts:
            low, high = max(start, at), min(end, at + part.count)
            if low < high:
                yield part, at, low, high
            at += part.count

    def ranges(self, positions: Positions) -> Ranges | tuple[Range, ...]:
        """Positions as ranges of segment indices, ascending in position."""
        if positions.stretches() > FEW:
            return Ranges(lambda: self._ranges(positions))
        return tuple(self._ranges(positions))

    def _ranges(self, positions: Positions) -> Iterator[Range]:
        for part, at, low, high in self._within(positions.start, positions.end):
            shift = part.first - at
            for start, end in positions.between(low, high):
                yield Range(start + shift, end - start)

    def positions(self, ranges: Iterable[Range]) -> Positions:
        """Ranges of segment indices as positions. Raises `IndexError` for a segment that the model does not have."""
        spans: list[Span] = []
        first = end = shift = 0  # of the part that the last one was in
        for one in ranges:
            index, left = one.first, one.count
            if first <= index and left > 0 and index + left <= end:
                spans.append((index + shift, index + left + shift))
                continue
            if left < 1:
                raise IndexError(f"{left} segments from {index} are no range")
            while left:
                start, room = self._place(index)
                count = min(left, room)
                spans.append((start, start + count))
                first, end, shift = index, index + room, start - index
                index, left = index + count, left - count
        return Positions.of(spans)

    def bytes_of(self, positions: Positions) -> int:
        """What they are in all."""
        return sum(
            self._bytes(part, at, high, positions.count(low, high), positions)
            for part, at, low, high in self._within(positions.start, positions.end)
        )

    def _bytes(self, part: Part, at: int, high: int, count: int, positions: Positions) -> int:
        """Bytes of `count` positions of one part that begins at `at`; they lie before `high`."""
        last = at + part.count - 1
        short = part.count * part.unit_bytes - part.nbytes if high > last else 0
        return count * part.unit_bytes - (short if short and positions.count(last, high) else 0)

    def first(self, positions: Positions, nbytes: int) -> Positions:
        """Of these, as many as are at most `nbytes`, from the beginning."""
        for part, at, low, high in self._within(positions.start, positions.end):
            size = self._bytes(part, at, high, positions.count(low, high), positions)
            if size > nbytes:
                return positions.before(positions.behind_first(max(nbytes, 0) // part.unit_bytes, low, high))
            nbytes -= size
        return positions.before(positions.end)

    def last(self, positions: Positions, nbytes: int) -> Positions:
        """Of these, as few as are at least `nbytes`, from the end; all where they are less."""
        if nbytes <= 0:
            return NONE
        for part, at, low, high in reversed(list(self._within(positions.start, positions.end))):
            count = positions.count(low, high)
            size = self._bytes(part, at, high, count, positions)
            if size >= nbytes:
                short = count * part.unit_bytes - size
                return positions.from_(positions.at_last(-(-(nbytes + short) // part.unit_bytes), low, high))
            nbytes -= size
        return positions

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

    def apply(self, trigger: SegmentTrigger, positions: Positions) -> int:
        """Take one step in the table for every position; returns the bytes that changed.

        Raises `Impossible`; nothing has changed then.
        """
        start, count = positions.start, len(positions.marks)
        states = self._states[start : start + count]
        chosen = int.from_bytes(positions.marks, "little") * _CHOSEN | int.from_bytes(states, "little")
        stepping = chosen.to_bytes(count, "little")
        moved: list[tuple[SegmentState, SegmentState, Positions]] = []
        for old in SegmentState:
            if _CHOSEN | old in stepping:
                new = after(SEGMENT, old, trigger)
                if new != old:
                    moved.append((old, new, Positions(start, stepping.translate(_TAKING[old]))))
        self._states[start : start + count] = stepping.translate(_STEP[trigger])
        return sum(self._moved(*one) for one in moved)

    def _moved(self, old: SegmentState, new: SegmentState, positions: Positions) -> int:
        """These have gone from one state to another: see to the sums. Returns their bytes."""
        nbytes = self.bytes_of(positions)
        self.bytes_in[old] -= nbytes
        self.bytes_in[new] += nbytes
        absent = (new == SegmentState.ABSENT) - (old == SegmentState.ABSENT)
        if absent and positions.end > self.fill_from:
            filled = (
                nbytes
                if positions.start >= self.fill_from
                else self.bytes_of(positions.from_(self.fill_from))
            )
            self.missing += absent * filled
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
                self._moved(state, SegmentState.ABSENT, self.in_state(state))
        self._states = bytearray(self.count)

    # Choosing

    def in_state(self, state: SegmentState) -> Positions:
        """All of one state."""
        return self._marked(_MARK[state], 0, self.count)

    def _marked(self, table: bytes, start: int, end: int) -> Positions:
        return Positions(start, bytes(self._states[start:end].translate(table)))

    def absent(self, start: int, end: int, nbytes: int) -> Positions:
        """Absent segments in [start, end), from its beginning, of at most `nbytes` in all."""
        return self.first(self._marked(_MARK[SegmentState.ABSENT], start, end), nbytes)

    def absent_bytes(self, start: int, end: int) -> int:
        """What is absent in [start, end)."""
        return self.bytes_of(self._marked(_MARK[SegmentState.ABSENT], start, end))

    def present_bytes(self, start: int, end: int) -> int:
        """What could be taken in [start, end)."""
        return self.bytes_of(self._marked(_MARK_PRESENT, start, end))

    def those(self, state: SegmentState, positions: Positions) -> Positions:
        """Those of these that are in this state."""
        marked = self._marked(_MARK[state], positions.start, positions.end)
        both = int.from_bytes(marked.marks, "little") & int.from_bytes(positions.marks, "little")
        return Positions(positions.start, both.to_bytes(len(positions.marks), "little"))

    def tail(self, start: int, end: int, nbytes: int) -> Positions:
        """What may be taken in [start, end), from its end: `nbytes` or a little more, or all there is."""
        return self.last(self._marked(_MARK_PRESENT, start, end), nbytes)

    def check(self) -> None:
        """Our own invariant: the sums are those of the states. Raises `AssertionError`."""
        for state in SegmentState:
            assert self.bytes_in[state] == sum(self.nbytes(a, b) for a, b in self.in_state(state)), state
        absent = self.in_state(SegmentState.ABSENT)
        assert self.missing == sum(
            self.nbytes(max(a, self.fill_from), max(b, self.fill_from)) for a, b in absent
        )
