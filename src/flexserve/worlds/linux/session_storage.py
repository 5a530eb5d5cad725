"""Saved sessions as the normal side keeps them: files of ciphertext with opaque names, in one directory.

Knows names, ages and sizes. Knows no token, and cannot read one; what is in a file, the secure world says.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import FlexServeError, StorageFailure
from ...sealed.session_file import SUFFIX
from .channel import OfferSession, SaveSession, SessionOffered, SessionSaved
from .workflows import WorkflowKeeper

LIMIT_BYTES = 4 << 30  # the oldest files go first
MAX_FILES = 256
_NAME = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}")


class SessionStorage:
    """One directory. Nothing else should be in it."""

    def __init__(self, directory: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        """Makes the directory, for this user alone. Raises `StorageFailure`."""
        self._directory = directory.absolute()
        self._limit_bytes = limit_bytes
        self._fd = -1  # once it is another user's
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for part in self._directory.glob(".*.part"):  # of a process that was killed
                part.unlink(missing_ok=True)
        except OSError as error:
            raise StorageFailure(f"cannot use {directory} for saved sessions: {error.strerror}") from error

    def give_away(self, uid: int, gid: int) -> None:
        """Make it another user's, and keep the way to it. Raises `StorageFailure`."""
        try:
            self._fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            for name in os.listdir(self._fd):  # noqa: PTH208 - a descriptor
                os.chown(name, uid, gid, dir_fd=self._fd, follow_symlinks=False)
            os.fchown(self._fd, uid, gid)
        except OSError as error:
            raise StorageFailure(f"cannot give {self._directory} to user {uid}: {error.strerror}") from error
        self._directory = Path(f"/proc/self/fd/{self._fd}")

    @property
    def directory(self) -> Path:
        """As this user reaches it now."""
        return self._directory

    def open_all(self) -> list[int]:
        """Descriptors of all files, newest first; those that are too many or too much are deleted."""
        return [fd for path in self._kept() if (fd := _opened(path)) is not None]

    def new(self) -> NewFile:
        """An empty file without a name. Raises `StorageFailure`."""
        return NewFile(self._directory)

    def delete(self, ids: list[bytes]) -> None:
        """Files of these ids are not needed any more."""
        for salt in ids:
            with contextlib.suppress(OSError):
                (self._directory / f"{salt.hex()}{SUFFIX}").unlink()

    def trim(self) -> None:
        """Delete what is beyond the limits, oldest first."""
        self._kept()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _kept(self) -> list[Path]:
        found: list[tuple[float, int, Path]] = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._directory):
                if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    info = entry.stat(follow_symlinks=False)
                    found.append((info.st_mtime, info.st_size, self._directory / entry.name))
        kept: list[Path] = []
        total = 0
        for _, size, path in sorted(found, reverse=True):
            total += size
            if total <= self._limit_bytes and len(kept) < MAX_FILES:
                kept.append(path)
                continue
            with contextlib.suppress(OSError):
                path.unlink()
        return kept


class NewFile:
    """A file that gets its name when it is whole, or none."""

    def __init__(self, directory: Path) -> None:
        """Raises `StorageFailure`."""
        self._directory = directory
        self._part = directory / f".{secrets.token_hex(8)}.part"
        try:
            self.fd = os.open(
                self._part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
        except OSError as error:
            raise StorageFailure(f"cannot create a file in {directory}: {error.strerror}") from error

    def commit(self, salt: bytes) -> None:
        """Give it its name. Raises `StorageFailure`."""
        try:
            os.fsync(self.fd)
            self._part.rename(self._directory / f"{salt.hex()}{SUFFIX}")
        except OSError as error:
            raise StorageFailure(f"cannot write a saved session: {error.strerror}") from error

    def close(self) -> None:
        """Forget the file unless it has its name."""
        os.close(self.fd)
        with contextlib.suppress(OSError):
            self._part.unlink(missing_ok=True)


class SessionKeeper:
    """Has a secure process save its sessions, and tells the next one of them."""

    def __init__(self, directory: Path, call: Callable[..., Any], cannot: Callable[[], None]) -> None:
        """`call(kind, make, descriptors, process)`: sends, and waits for the answer. `cannot`: say that nothing can be
        saved now. Raises `StorageFailure`."""
        self.storage = SessionStorage(directory)
        self.workflows = WorkflowKeeper(lambda: self.storage.directory, call)
        self._call = call
        self._cannot = cannot
        self._saving = threading.Lock()
        self._changed = threading.Condition()
        self._wanted = False
        self._ended = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """From now on save whenever the secure world wants to."""
        self._thread = threading.Thread(target=self._run, name="save-sessions", daemon=True)
        self._thread.start()

    def offer(self, process: object) -> None:
        """Tell a fresh process of the saved sessions; those it does not believe are left alone, and grow old.

        Raises `WorldCrashed`.
        """
        self.workflows.offer(process)
        for fd in (descriptors := self.storage.open_all()):
            try:
                self._call(SessionOffered, OfferSession, (fd,), process)
            except FlexServeError:
                for rest in descriptors[descriptors.index(fd) + 1 :]:
                    os.close(rest)
                raise
            finally:
                os.close(fd)

    def save(self, *, everything: bool = True) -> int:
        """Have sessions saved: those that the secure world wants saved, or all that are not; how many were.

        Raises `StorageFailure`, `WorldCrashed`.
        """
        count = 0
        with self._saving:
            while True:
                file = self.storage.new()
                try:
                    answer = self._call(
                        SessionSaved, lambda call: SaveSession(call, everything=everything), (file.fd,)
                    )
                    if answer.id is not None:
                        file.commit(answer.id)
                finally:
                    file.close()
                self.storage.delete(answer.gone)
                if answer.id is None:
                    self.storage.trim()
                    return count
                count += 1

    def wanted(self) -> None:
        """The secure world has sessions to save, or files that it does not need any more."""
        with self._changed:
            self._wanted = True
            self._changed.notify_all()

    def finish(self) -> None:
        """Save a last time, while there is a process. May be called twice."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        with contextlib.suppress(FlexServeError):
            self.save()
        with contextlib.suppress(FlexServeError):
            self.workflows.save(now=True)

    def _run(self) -> None:
        while self._wait():
            try:
                self.save(everything=False)
                self.workflows.save(now=False)
            except StorageFailure:  # the disk is full
                self._cannot()
            except FlexServeError:  # the process ends
                continue

    def _wait(self) -> bool:
        """Until something is to be saved; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanted or self._ended)
            self._wanted = False
            return not self._ended


def _opened(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
