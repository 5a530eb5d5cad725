"""What the normal side reads for the secure world: ciphertext as descriptors, licences as bytes. Believes neither."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ...errors import NotFound, StorageFailure
from ...sealed.device_copy import default_path
from ..base import ModelSource

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
