"""Strings that know which of their characters the chat template wrote.

A chat template mixes its own text, where `<|im_end|>` is a control token, with text from clients, where it is
just ten characters. `Marked` is a `str` that carries the ranges that came from the template (or from us: bos,
eos, roles). Operations that templates use on strings keep the ranges exactly; every other operation gives a
plain `str`, in which nothing is trusted. So an operation nobody thought of can only turn template text into
plain text, never a client's text into a control token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, SupportsIndex

Range = tuple[int, int]


class Marked(str):
    """A string with the sorted, disjoint, non-empty ranges of its trusted characters."""

    __slots__ = ("trusted",)
    trusted: tuple[Range, ...]

    def __new__(cls, text: str = "", trusted: tuple[Range, ...] = ()) -> Marked:
        self = super().__new__(cls, text)
        self.trusted = trusted
        return self

    def __str__(self) -> str:
        return self  # so that str(), which Jinja applies to everything, keeps the ranges

    def __add__(self, other: str) -> str:
        return concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return concat((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> str:
        text = str.__mul__(self, count)
        if self.trusted == ((0, len(self)),) and text:
            return Marked(text, ((0, len(text)),))
        return text

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return self._cut(start, max(start, stop)) if step == 1 else str.__getitem__(self, key)
        index = key.__index__()
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError("string index out of range")
        return self._cut(index, index + 1)

    def _cut(self, start: int, stop: int) -> Marked:
        if start >= stop:
            return Marked()
        kept = (
            (max(a, start) - start, min(b, stop) - start) for a, b in self.trusted if a < stop and b > start
        )
        return Marked(str.__getitem__(self, slice(start, stop)), tuple(kept))

    def strip(self, chars: str | None = None, /) -> str:
        left = len(self) - len(str.lstrip(self, chars))
        return self._cut(left, max(left, len(str.rstrip(self, chars))))

    def lstrip(self, chars: str | None = None, /) -> str:
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        return self._cut(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> str:
        return self._cut(len(prefix), len(self)) if prefix and self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> str:
        return self._cut(0, len(self) - len(suffix)) if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return list(self._located(str.split(self, sep, maxsplit), skip=len(sep) if sep else 0))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return list(self._located(str.rsplit(self, sep, maxsplit), skip=len(sep) if sep else 0))

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        head, middle, tail = self._located(str.partition(self, sep), skip=0)
        return head, middle, tail

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        head, middle, tail = self._located(str.rpartition(self, sep), skip=0)
        return head, middle, tail

    def _located(self, pieces: Iterable[str], skip: int) -> Iterator[Marked]:
        """The same pieces with their ranges: each begins `skip` behind the last, or where blanks end."""
        at = 0
        for number, piece in enumerate(pieces):
            if number:
                at += skip
            start = self.find(piece, at)
            yield self._cut(start, start + len(piece))
            at = start + len(piece)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            return str.replace(self, old, new, count)
        pieces = self.split(old, count)
        return _join(new, pieces)

    def join(self, parts: Iterable[str], /) -> str:
        return _join(self, parts)

    def upper(self) -> str:
        return self._mapped(str.upper)

    def lower(self) -> str:
        return self._mapped(str.lower)

    def capitalize(self) -> str:
        return self._mapped(str.capitalize)

    def title(self) -> str:
        return self._mapped(str.title)

    def _mapped(self, change: Callable[[str], str]) -> str:
        text = change(self)
        whole = self.trusted == ((0, len(self)),)
        return Marked(text, ((0, len(text)),)) if whole and text else text

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str.__str__(self),)  # copies trust nothing


def literal(text: str) -> Marked:
    """Text that the template or we wrote."""
    return Marked(text, ((0, len(text)),) if text else ())


def ranges(text: str) -> tuple[Range, ...]:
    """The trusted ranges; none in a plain string."""
    return text.trusted if isinstance(text, Marked) else ()


def concat(parts: Iterable[str]) -> str:
    """`"".join(parts)` with the ranges kept."""
    pieces = list(parts)
    joined: list[Range] = []
    at = 0
    for piece in pieces:
        for start, stop in ranges(piece):
            if joined and joined[-1][1] == at + start:
                joined[-1] = joined[-1][0], at + stop
            else:
                joined.append((at + start, at + stop))
        at += len(piece)
    text = "".join(pieces)
    return Marked(text, tuple(joined)) if joined else text


def _join(separator: str, parts: Iterable[str]) -> str:
    interleaved: list[str] = []
    for part in parts:
        if interleaved:
            interleaved.append(separator)
        interleaved.append(part)
    return concat(interleaved)
