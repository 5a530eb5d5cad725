"""Which parts of a prompt may be control tokens, and the pieces to hand to the tokenizer.

Knows texts only; the vocabulary's control tokens are given by whoever has one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .marked import ranges


@dataclass(frozen=True)
class Span:
    """A part of a prompt by one author: the chat template (control tokens count) or a client (no)."""

    text: str
    is_template: bool


@dataclass(frozen=True)
class ControlToken:
    """A token that only a template may produce. Some swallow the white space beside them (llama.cpp's
    LLAMA_TOKEN_ATTR_LSTRIP and _RSTRIP)."""

    text: str
    lstrip: bool = False
    rstrip: bool = False


def spans_of(text: str) -> tuple[Span, ...]:
    """Cut a rendered prompt at the borders of its trusted ranges."""
    plain = str.__str__(text)
    spans: list[Span] = []
    at = 0
    for start, stop in ranges(text):
        if start > at:
            spans.append(Span(plain[at:start], False))
        spans.append(Span(plain[start:stop], True))
        at = stop
    if at < len(plain):
        spans.append(Span(plain[at:], False))
    return tuple(spans)


class ControlTokens:
    """A vocabulary's control tokens, made once for each model.

    `control` are the tokens the tokenizer parses only when asked to (LLAMA_TOKEN_ATTR_CONTROL, _UNKNOWN).
    `reserved` are texts it would find in any text (LLAMA_TOKEN_ATTR_USER_DEFINED) but that a client must not
    be able to write all the same, such as `<|start|>`; leave out what ordinary text contains, such as runs of
    blanks.
    """

    def __init__(self, control: Iterable[ControlToken], reserved: Iterable[str] = ()) -> None:
        self._control = {token.text: token for token in control if token.text}
        self._find_control = _pattern(self._control)
        self._find_reserved = _pattern({text for text in reserved if len(text) > 1})

    def pieces(self, spans: Sequence[Span]) -> tuple[Span, ...]:
        """What to tokenise, one call each, and concatenate.

        A piece with `is_template` is exactly one control token: tokenise it with special tokens on. All
        others are text, with special tokens off: text of template and client between two control tokens is
        one piece, as in llama.cpp, so that tokens may span the border. Only where a reserved text has a
        client's character in it is the piece cut, behind its first character, so that no token is found.
        """
        pieces: list[Span] = []
        between: list[Span] = []  # the text since the last control token
        strip = False
        for span in _merged(spans):
            at = 0
            if span.is_template and self._find_control is not None:
                for match in self._find_control.finditer(span.text):
                    token = self._control[match.group()]
                    between.append(Span(span.text[at : match.start()], True))
                    pieces += self._text_pieces(between, strip, token.lstrip)
                    pieces.append(Span(token.text, True))
                    between, strip, at = [], token.rstrip, match.end()
            between.append(Span(span.text[at:], span.is_template))
        pieces += self._text_pieces(between, strip, False)
        return tuple(pieces)

    def _text_pieces(self, parts: Sequence[Span], lstrip: bool, rstrip: bool) -> Iterator[Span]:
        whole = "".join(part.text for part in parts)
        start = len(whole) - len(whole.lstrip()) if lstrip else 0
        stop = len(whole.rstrip()) if rstrip else len(whole)
        cuts: list[int] = []
        if self._find_reserved is not None:
            trusted = _template_ranges(parts)
            match = self._find_reserved.search(whole, start)
            while match:
                if not any(a <= match.start() and match.end() <= b for a, b in trusted):
                    cuts.append(match.start() + 1)
                match = self._find_reserved.search(whole, match.start() + 1)  # they may overlap
        for a, b in itertools.pairwise((start, *cuts, stop)):
            if a < b:
                yield Span(whole[a:b], False)


def _template_ranges(parts: Sequence[Span]) -> list[tuple[int, int]]:
    ends = list(itertools.accumulate(len(part.text) for part in parts))
    return [(end - len(part.text), end) for part, end in zip(parts, ends, strict=True) if part.is_template]


def _merged(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for is_template, group in itertools.groupby(spans, key=lambda span: span.is_template):
        merged.append(Span("".join(span.text for span in group), is_template))
    return merged


def _pattern(texts: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
