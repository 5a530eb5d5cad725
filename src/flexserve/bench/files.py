"""The models a bench measures: generated, sealed and licensed once, kept for the next run.

Knows the bench directory's files and what they take on disk; nothing is measured here.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import NotAuthentic, NotLicensed, StorageFailure
from ..sealed.device_copy import default_path
from ..sealed.keyfile import load_device_key, load_vendor_key, write_key
from ..sealed.keys import DeviceKey, VendorKey
from ..sealed.licence import issue, open_licence
from ..sealed.reader import SealedModel
from ..sealed.seal import seal
from ..sealed.verify import check_inside
from ..worlds.base import ModelSource
from .generate import model_bytes, write_model
from .shapes import shape_named

MODEL_SEED = 1
MODEL_NAME = "bench"  # under which worlds register it
Say = Callable[[str], None]
Progress = Callable[[int, int], None]
SPARE_DISK_BYTES = 1 << 30


@dataclass(frozen=True)
class BenchModel:
    """A model in both forms, and the keys to the sealed one. `source` is in the plain layout, always."""

    gguf: Path
    source: ModelSource
    device_key: Path
    vendor_pub: Path

    @property
    def weight_bytes(self) -> int:
        """Size of the GGUF file, of which the header is a few MB."""
        return self.gguf.stat().st_size

    @property
    def copy(self) -> Path:
        """The device's own copy in execution layout, once it has been made."""
        return default_path(self.source.sealed)

    @property
    def disk_bytes(self) -> int:
        """Of all forms that are there."""
        return sum(
            path.stat().st_size for path in (self.gguf, self.source.sealed, self.copy) if path.exists()
        )


def prepare_model(
    directory: Path, shape_name: str, quant: str, say: Say, progress: Progress | None = None
) -> BenchModel:
    """Generate, seal and license what is missing; what is there is used again.

    Raises `Usage` for a shape or quantisation there is none of, `StorageFailure` when the disk is too small.
    """
    shape = shape_named(shape_name)
    with _storage(directory):
        directory.mkdir(parents=True, exist_ok=True)
    vendor_path, device_path = directory / "vendor.key", directory / "device.key"
    if not vendor_path.exists():
        write_key(vendor_path, VendorKey.generate())
    if not device_path.exists():
        write_key(device_path, DeviceKey.generate())
    vendor, device = load_vendor_key(vendor_path), load_device_key(device_path)
    name = f"{shape_name}-{quant}"
    gguf, flex, licence = (directory / f"{name}.{suffix}" for suffix in ("gguf", "flex", "lic"))
    missing = (not gguf.exists()) + (not flex.exists())
    if missing:
        _check_room(directory, missing * model_bytes(shape, quant))
    if not gguf.exists():
        say(f"generating {gguf}: random weights, {_gigabytes(model_bytes(shape, quant))}")
        write_model(shape, quant, gguf, seed=MODEL_SEED, progress=progress)
    if not _is_usable(flex, licence, vendor, device):
        say(f"sealing {flex}")
        seal(gguf, flex, vendor, model_id=name, version=1, progress=progress)
        with flex.open("rb") as file:
            sealed = SealedModel.open(file.fileno(), [vendor.public])
        licence.write_bytes(
            issue(sealed, vendor, device.public, issued_at=int(time.time()), serial=time.time_ns())
        )
    source = ModelSource(MODEL_NAME, flex, licence, use_copy=False)
    model = BenchModel(gguf, source, device_path, vendor_path.with_suffix(".pub"))
    say(
        f"{name} takes {_gigabytes(model.disk_bytes)} in {directory}, {_gigabytes(used_bytes(directory))} with others"
    )
    return model


def used_bytes(directory: Path) -> int:
    """What the bench directory's files take."""
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())


def _is_usable(flex: Path, licence: Path, vendor: VendorKey, device: DeviceKey) -> bool:
    """Whether a sealed model from before still is what this FlexServe seals, and these keys open it."""
    try:
        with flex.open("rb") as file:
            sealed = SealedModel.open(file.fileno(), [vendor.public])
            key, _ = open_licence(licence.read_bytes(), sealed, device, None, time.time())
            unlocked = sealed.unlock(key)
            check_inside(unlocked.manifest, unlocked.gguf_header())
    except (FileNotFoundError, NotAuthentic, NotLicensed):
        return False
    return True


def _check_room(directory: Path, need_bytes: int) -> None:
    with _storage(directory):
        free = shutil.disk_usage(directory).free
    if free < need_bytes + SPARE_DISK_BYTES:
        raise StorageFailure(
            f"the model takes {_gigabytes(need_bytes)} in {directory}, where {_gigabytes(free)} are free",
            hint="remove models that are no longer needed there, or name another place with --directory",
        )


@contextmanager
def _storage(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageFailure(f"cannot use {directory}: {error.strerror}") from error


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
