"""Files that appear whole under their name, or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import StorageFailure, Usage


def xdg_directory(variable: str, below_home: str) -> Path:
    """`flexserve` in the directory of an XDG variable (relative ones do not count), or below the home
    directory. Raises `Usage` where there is no home directory either."""
    base = os.environ.get(variable, "")
    if base.startswith("/"):
        return Path(base) / "flexserve"
    try:
        return Path.home() / below_home / "flexserve"
    except RuntimeError:
        raise Usage("this user has no home directory", hint=f"set {variable}") from None


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A descriptor of a new file that gets the name `path`, synced, when the block ends well.

    When the block raises (KeyboardInterrupt too) the new file is removed and `path` stays as it was. Raises
    `StorageFailure` for an `OSError` of its own or of the block.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StorageFailure(f"cannot create a file in {path.parent}: {error.strerror}") from error
    try:
        try:
            yield fd
            os.fsync(fd)
            part.rename(path)
            _sync_directory(path.parent)
        finally:
            os.close(fd)
            part.unlink(missing_ok=True)
    except OSError as error:
        raise StorageFailure(f"cannot write {path}: {error.strerror}") from error


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write through short writes. Raises `OSError`."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def _sync_directory(path: Path) -> None:
    """Make a rename in this directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
