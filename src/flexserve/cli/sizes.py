"""Sizes as people type them."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import click

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b)?|b)?", re.IGNORECASE)


class Size(click.ParamType[Any]):
    """Bytes: `512M`, `1.5G` and `1GiB` in powers of 1024, `1GB` in powers of 1000; `all` where that makes sense."""

    name = "SIZE"

    def __init__(self, *, allow_all: bool = False) -> None:
        """`allow_all`: `all` is None."""
        self._allow_all = allow_all

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if not isinstance(value, str):
            assert value is None or isinstance(value, int)
            return value
        if self._allow_all and value.lower() == "all":
            return None
        match = _SIZE.fullmatch(value.strip())
        if match is None or not value.isascii():
            more = ", or all" if self._allow_all else ""
            self.fail(f"{value!r} is not a size like 512M, 1.5G or 1GB{more}", param, ctx)
        number, unit, rest = match.groups()
        base = 1000 if (rest or "").lower() == "b" else 1024
        size = Fraction(number) * base ** (" kmgt".index(unit.lower()) if unit else 0)
        if size >= 1 << 60:
            self.fail(f"{value!r} is more than any machine has", param, ctx)
        return int(size)
