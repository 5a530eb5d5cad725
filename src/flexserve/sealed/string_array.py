"""Arrays of strings inside a GGUF header, decoded one at a time.

Knows the layout of GGUF strings (a 64-bit length, then bytes); the bounds were checked by whoever found the
starts (gguf.py).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import overload

_U64 = struct.Struct("<Q")


class StringArray(Sequence[str]):
    """An array of strings inside the header, decoded one at a time when asked for.

    The bounds of every element have been checked; whether it is UTF-8 has not (vocabularies hold pieces of
    characters): `[i]` replaces what is not, `raw(i)` gives the bytes.
    """

    __slots__ = ("_data", "_starts", "max_bytes", "total_bytes")

    def __init__(self, data: bytes, starts: array[int], max_bytes: int, total_bytes: int) -> None:
        self._data = data
        self._starts = starts  # of each length field
        self.max_bytes = max_bytes  # of the longest element
        self.total_bytes = total_bytes

    def __len__(self) -> int:
        return len(self._starts)

    def raw(self, index: int) -> bytes:
        start = self._starts[index]
        (length,) = _U64.unpack_from(self._data, start)
        return self._data[start + 8 : start + 8 + length]

    def raws(self) -> Iterator[bytes]:
        return (self.raw(i) for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.raw(index).decode("utf-8", "replace")
