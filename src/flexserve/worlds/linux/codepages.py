"""No page of this process stays writable and executable, under one address or under two.

libffi makes such pages for functions of Python that C calls (llama.cpp's log is one): one page that is both, or, where
that is refused, one memory file mapped twice. What is made so far keeps working; nothing of the kind can be made
afterwards. Knows /proc/self/maps (proc(5)) and mprotect; that nothing becomes executable again is the filter's.
"""

from __future__ import annotations

import ctypes
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import EngineFailure

_READ, _EXEC = 1, 4
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ ([0-9a-f]+):([0-9a-f]+) (\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Mapping:
    """A line of /proc/PID/maps. `file`: device and inode; None for memory of its own."""

    start: int
    end: int
    permissions: str
    file: tuple[int, int] | None


def mappings(text: str) -> list[Mapping]:
    """What /proc/PID/maps says."""
    return [
        Mapping(
            int(start, 16),
            int(end, 16),
            permissions,
            (os.makedev(int(major, 16), int(minor, 16)), int(inode)) if inode != "0" else None,
        )
        for start, end, permissions, major, minor, inode in _LINE.findall(text)
    ]


def twice_mapped(found: list[Mapping]) -> set[tuple[int, int]]:
    """The files whose pages are shared by an executable mapping."""
    return {m.file for m in found if m.file is not None and "x" in m.permissions and "s" in m.permissions}


def seal_code() -> None:
    """Take the writing away from pages that can be executed. Raises `EngineFailure` when the kernel refuses."""
    found = mappings(Path("/proc/self/maps").read_text())
    twice = twice_mapped(found)
    for mapping in found:
        size = mapping.end - mapping.start
        if "w" not in mapping.permissions:
            continue
        if "x" in mapping.permissions:
            _check(_libc.mprotect(mapping.start, size, _READ | _EXEC))
        elif mapping.file in twice:
            _check(_libc.munmap(mapping.start, size))  # it could be made writable again
    for fd in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        with suppress(OSError):  # the one that listed them
            info = os.fstat(fd)
            if (info.st_dev, info.st_ino) in twice:
                os.close(fd)


def _check(status: int) -> None:
    if status != 0:
        reason = os.strerror(ctypes.get_errno())
        raise EngineFailure(f"cannot harden the secure world: a page of code stays writable: {reason}")
