"""Files that appear whole under their name, or not at all."""

from __future__ import annotations

import errno
import mmap
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import NotFound, StorageFailure, Usage


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
def opened(path: Path, what: str) -> Iterator[int]:
    """A descriptor for reading; it does not wait for a FIFO's writer. Raises `NotFound`, `StorageFailure`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"there is no {what} {path}") from None
    except OSError as error:
        raise StorageFailure(f"cannot open {path}: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


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


def page_buffer(size: int) -> memoryview:
    """Zeroed memory that starts on a page, as direct writes need it."""
    return memoryview(mmap.mmap(-1, size))


class BulkWriter:
    """Writes whole pages past the page cache where the file system can, and through it where it cannot.

    Copying into the page cache and flushing it again costs as much CPU time as encrypting and hashing
    together. May be used from several threads; does not own the descriptor it is made for.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._direct: int | None = None
        with suppress(OSError):  # no /proc, or a file system without direct I/O
            path = f"/proc/self/fd/{fd}"
            self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        self._use_direct = self._direct is not None

    def write(self, data: memoryview, offset: int) -> None:
        """`data` starts on a page (`page_buffer`); its length and `offset` are in whole pages. Raises `OSError`."""
        if self._use_direct and self._direct is not None:
            try:
                return pwrite_all(self._direct, data, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:  # larger blocks than pages, or the rest of a short write
                    raise
                self._use_direct = False
        return pwrite_all(self._fd, data, offset)

    def close(self) -> None:
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None


def _sync_directory(path: Path) -> None:
    """Make a rename in this directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
