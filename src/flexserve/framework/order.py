"""In which order segments are loaded for a request: what compute needs first comes first (paper, 5.1).

Pure. Knows regions of a sealed model as index ranges; does not know which of them are resident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Consecutive segment indices: `first` to `first + count - 1`."""

    first: int
    count: int


class Ranges(Iterable[Range]):
    """Very many ranges, made when somebody looks at them: deciding which costs less than naming them."""

    def __init__(self, make: Callable[[], Iterator[Range]]) -> None:
        """`make` gives the same ranges whenever it is called."""
        self._make = make

    def __iter__(self) -> Iterator[Range]:
        return self._make()

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges | tuple) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


def join(indices: Iterable[int]) -> list[Range]:
    """Sorted indices as ranges of neighbours."""
    ranges: list[Range] = []
    for index in indices:
        if ranges and ranges[-1].first + ranges[-1].count == index:
            ranges[-1] = Range(ranges[-1].first, ranges[-1].count + 1)
        else:
            ranges.append(Range(index, 1))
    return ranges


def without(whole: Range, holes: Iterable[Range]) -> list[Range]:
    """What is left of a range; `holes` are sorted, do not touch each other and lie inside it."""
    left: list[Range] = []
    at = whole.first
    for hole in holes:
        if hole.first > at:
            left.append(Range(at, hole.first - at))
        at = hole.first + hole.count
    end = whole.first + whole.count
    return [*left, Range(at, end - at)] if end > at else left


def load_order(
    embed: Range, body: Range, rows: Iterable[int], *, tied_output: bool, left_out: Iterable[Range] = ()
) -> list[Range]:
    """The order for one request: the embedding units of the prompt's tokens, the body (which is sealed in
    execution order), then the whole embedding when it serves as output matrix too.

    `rows`: sorted units within EMBED, counted from 0. An untied embedding is never loaded as a whole:
    the rows of generated tokens are fetched when compute touches them. So are the parts of the body in
    `left_out` (as for `without`): experts, of which nobody knows yet which ones the prompt will choose.
    """
    order = [Range(embed.first + r.first, r.count) for r in join(rows)]
    order += without(body, left_out)
    if tied_output:
        order.append(embed)
    return order
