"""What the normal side reads for the secure world: ciphertext as descriptors, licences as bytes. Believes neither."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ...errors import NotFound, StorageFailure
from ...sealed.device_copy import default_path
from ..base import AdapterSource, ModelSource
from .channel import AdapterUse

MAX_LICENCE_BYTES = 1 << 16


def open_sealed(path: Path) -> list[int]:
    """Descriptors of a sealed model: through the page cache, and past it where the file system can.

    Raises `NotFound`, `StorageFailure`.
    """
    try:
        descriptors = [os.open(path, os.O_RDONLY | os.O_CLOEXEC)]
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}") from None
    except OSError as error:
        raise StorageFailure(f"cannot read {path}: {error.strerror}") from error
    with contextlib.suppress(OSError):
        descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))
    return descriptors


def open_copy(source: ModelSource) -> list[int] | None:
    """Descriptors of the device's own copy of a model, as `open_sealed`; none where there is no file at the usual
    place, None where no copy is to be used. Raises `NotFound` for a copy that was named."""
    if not source.use_copy:
        return None
    if source.copy is not None:
        return open_sealed(source.copy)
    try:
        return open_sealed(default_path(source.sealed))
    except (NotFound, StorageFailure):  # it is never needed
        return []


def read_licence(path: Path) -> bytes:
    """A licence file's content, at most MAX_LICENCE_BYTES. Raises `NotFound`, `StorageFailure`."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_LICENCE_BYTES)
    except FileNotFoundError:
        raise NotFound(f"there is no licence {path}") from None
    except OSError as error:
        raise StorageFailure(f"cannot read {path}: {error.strerror}") from error


def given_away(state: Path, uid: int, gid: int) -> Path:
    """Make the directory of root's device state another user's: its name from now on, which works even where that
    user may not enter what lies above. Raises `StorageFailure`."""
    directory = state.parent
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for path in (state, state.with_suffix(".lock")):
            with contextlib.suppress(FileNotFoundError):
                os.chown(path, uid, gid, follow_symlinks=False)
        os.fchown(fd, uid, gid)  # last: root without all its powers cannot enter it afterwards
    except OSError as error:
        raise StorageFailure(f"cannot give {directory} to user {uid}: {error.strerror}") from error
    return Path(f"/proc/self/fd/{fd}")


class Storage:
    """Opens what the normal side reads, also when it may not open it any more: a gateway that was root keeps
    descriptors of its models, for when the secure process has to be started again."""

    def __init__(self) -> None:
        self._kept: dict[Path, list[int]] = {}
        self._copies: dict[Path, list[int] | None] = {}
        self._licences: dict[Path, bytes] = {}

    def keep(self, source: ModelSource) -> None:
        """Open a model's files now, for later. Raises as opening them does."""
        self._kept[source.sealed] = open_sealed(source.sealed)
        self._copies[source.sealed] = open_copy(source)
        self._licences[source.licence] = read_licence(source.licence)
        if source.adapter is not None:
            self._kept[source.adapter.sealed] = open_sealed(source.adapter.sealed)
            self._licences[source.adapter.licence] = read_licence(source.adapter.licence)

    def open_sealed(self, path: Path) -> list[int]:
        """As the function; the caller closes the descriptors."""
        return _duplicates(self._kept[path]) if path in self._kept else open_sealed(path)

    def open_adapter(self, adapter: AdapterSource | None, descriptors: list[int]) -> AdapterUse | None:
        """What to say of a model's adapter; its file is added to the descriptors, which the caller closes."""
        if adapter is None:
            return None
        licence = self.read_licence(adapter.licence)
        cached, *direct = self.open_sealed(adapter.sealed)
        for fd in direct:
            os.close(fd)
        descriptors.append(cached)
        return AdapterUse(licence, adapter.scale)

    def open_copy(self, source: ModelSource) -> list[int] | None:
        """As the function; the caller closes the descriptors."""
        if source.sealed not in self._copies:
            return open_copy(source)
        kept = self._copies[source.sealed]
        return None if kept is None else _duplicates(kept)

    def read_licence(self, path: Path) -> bytes:
        """As the function."""
        return self._licences[path] if path in self._licences else read_licence(path)

    def close(self) -> None:
        """Forget what was kept; may be called twice."""
        for descriptors in (*self._kept.values(), *self._copies.values()):
            for fd in descriptors or ():
                os.close(fd)
        for kept in (self._kept, self._copies, self._licences):
            kept.clear()


def _duplicates(descriptors: list[int]) -> list[int]:
    return [os.dup(fd) for fd in descriptors]
