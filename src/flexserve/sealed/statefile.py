"""Where the normal world keeps a device's state blob, and how it replaces it whole.

Knows paths, locks and renames; the blob's content and its authentication are state.py's.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import StorageFailure
from .files import pwrite_all, replacing, xdg_directory
from .state import MAX_STATE_BYTES


def state_path(device_key_id: bytes) -> Path:
    """$XDG_STATE_HOME/flexserve/device-ID.state, or below ~/.local/state."""
    return xdg_directory("XDG_STATE_HOME", ".local/state") / f"device-{device_key_id.hex()[:32]}.state"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the state file against other FlexServe processes: load, open the licence, store.

    Without the lock, two starts at once could each store a state that lacks the other's serial.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageFailure(f"cannot lock {path}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def load(path: Path) -> bytes | None:
    """The stored blob, None on a new device. Raises `StorageFailure`."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_STATE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageFailure(f"cannot read {path}: {error.strerror}") from error


def store(path: Path, blob: bytes) -> None:
    """Replace the stored blob whole. Raises `StorageFailure`."""
    if load(path) == blob:
        return
    with replacing(path) as fd:
        os.fchmod(fd, 0o600)
        pwrite_all(fd, blob, 0)
