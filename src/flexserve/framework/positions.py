"""A set of positions in execution order, one byte for each: 1 for those that are in it.

So however scattered a set is, finding, cutting and counting it goes at memory speed. A list of the stretches would
cost some microseconds for each of them, tens of milliseconds for a model of which every second segment is missing.
Knows nothing of segments' sizes and states (weights.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Span = tuple[int, int]  # positions: first, and one behind the last

_MARKED = re.compile(b"\1+")


@dataclass(frozen=True)
class Positions:
    """Position `start + i` is in it when `marks[i]` is 1, and not when it is 0. Iterates as spans, ascending."""

    start: int
    marks: bytes

    @classmethod
    def of(cls, spans: Iterable[Span]) -> Positions:
        """Spans in any order; what is in several of them is in it once."""
        spans = list(spans)
        if not spans:
            return NONE
        start, end = min(first for first, _ in spans), max(end for _, end in spans)
        if len(spans) == 1:
            return cls(start, b"\1" * (end - start))
        marks = bytearray(end - start)
        for one, behind in spans:
            marks[one - start : behind - start] = b"\1" * (behind - one)
        return cls(start, bytes(marks))

    @property
    def end(self) -> int:
        """One behind the last position that could be in it."""
        return self.start + len(self.marks)

    def __bool__(self) -> bool:
        return 1 in self.marks

    def __iter__(self) -> Iterator[Span]:
        return self.between(self.start, self.end)

    def between(self, low: int, high: int) -> Iterator[Span]:
        """The spans of those in [low, high)."""
        start = self.start
        for run in _MARKED.finditer(self.marks, max(low - start, 0), max(high - start, 0)):
            yield start + run.start(), start + run.end()

    def count(self, low: int, high: int) -> int:
        """How many of those in [low, high)."""
        return self.marks.count(1, max(low - self.start, 0), max(high - self.start, 0))

    def stretches(self) -> int:
        """How many spans it has."""
        return self.marks.count(b"\0\1") + self.marks.startswith(b"\1")

    def before(self, position: int) -> Positions:
        """Those before it; the set begins at its first one."""
        first = max(self.marks.find(1), 0)
        return Positions(self.start + first, self.marks[first : max(position - self.start, 0)])

    def from_(self, position: int) -> Positions:
        """Those from it on."""
        skip = max(position - self.start, 0)
        return Positions(self.start + skip, self.marks[skip:])

    def behind_first(self, count: int, low: int, high: int) -> int:
        """The position behind the first `count` of those in [low, high), which are more: where the next one is."""
        return self.at_last(self.count(low, high) - count, low, high)

    def at_last(self, count: int, low: int, high: int) -> int:
        """The position of the `count`-th last (from 1) of those in [low, high), which are as many or more."""
        low, high = max(low - self.start, 0), high - self.start
        while high - low > 1:
            middle = (low + high) // 2
            above = self.marks.count(1, middle, high)
            if above >= count:
                low = middle
            else:
                count -= above
                high = middle
        return self.start + low


NONE = Positions(0, b"")
