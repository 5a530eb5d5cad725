"""Sealed models for tests: a vendor, a device, tiny models, and a vendor who seals whatever it likes."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexserve.bench.generate import write_model
from flexserve.bench.shapes import ModelShape
from flexserve.errors import FlexServeError, SegmentNotAuthentic
from flexserve.sealed.crypto import SIGNATURE_BYTES
from flexserve.sealed.format import Description, Manifest, TensorExtent
from flexserve.sealed.gguf import parse_header
from flexserve.sealed.keys import DeviceKey, DevicePublicKey, VendorKey, VendorPublicKey
from flexserve.sealed.licence import issue, open_licence
from flexserve.sealed.reader import SealedModel
from flexserve.sealed.seal import Content, content_of, seal, write_sealed
from flexserve.sealed.verify import Report, verify

NOW = 1_800_000_000  # 2027-01-15
DAY = 86400

TINY = ModelShape("tiny", "llama", 1, 64, 96, 2, 1, 32, 288, 512, 10000.0, 1e-5, False)  # 90 kB
SMALL = ModelShape("small", "llama", 3, 256, 512, 4, 2, 64, 512, 2048, 10000.0, 1e-5, False)  # 2.2 MB


@dataclass(frozen=True)
class Kit:
    """A sealed model with everything that belongs to it. Tests change copies of its files only."""

    directory: Path
    vendor: VendorKey
    device: DeviceKey
    gguf: Path
    flex: Path
    licence: bytes
    manifest: Manifest

    @property
    def data(self) -> bytes:
        return self.flex.read_bytes()


def make_kit(directory: Path, shape: ModelShape = TINY, **options: Any) -> Kit:
    """Random weights in a true shape, sealed and licensed. `options` go to `seal`."""
    directory.mkdir(parents=True, exist_ok=True)
    vendor, device = VendorKey.generate(), DeviceKey.generate()
    gguf, flex = directory / "m.gguf", directory / "m.flex"
    write_model(shape, "Q8_0", gguf)
    manifest = seal(gguf, flex, vendor, **options)
    return Kit(directory, vendor, device, gguf, flex, license_for(flex, vendor, device), manifest)


def license_for(
    flex: Path,
    vendor: VendorKey,
    device: DeviceKey | DevicePublicKey,
    *,
    serial: int = 1,
    **fields: int,
) -> bytes:
    """A licence for the model at `flex`; `fields` are `issue`'s."""
    public = device.public if isinstance(device, DeviceKey) else device
    with flex.open("rb") as file:
        sealed = SealedModel.open(file.fileno(), [vendor.public])
        return issue(sealed, vendor, public, serial=serial, **{"issued_at": NOW - DAY, **fields})


def model_key(flex: Path, vendor: VendorKey) -> bytes:
    """The model key, as the vendor (or whoever broke a device) has it."""
    with flex.open("rb") as file:
        m = SealedModel.open(file.fileno(), [vendor.public]).manifest
    return vendor.unwrap(m.vendor_wrap, m.vendor_wrap_info)


def full_check(
    flex: Path,
    licence: bytes,
    device: DeviceKey,
    trusted: list[VendorPublicKey],
    *,
    state: bytes | None = None,
    now: int = NOW,
) -> tuple[Report, bytes]:
    """The whole path, open -> licence -> every segment; returns what `verify` found and the new state.

    Raises whatever refused the files; `SegmentNotAuthentic` when segments are bad.
    """
    with flex.open("rb") as file:
        sealed = SealedModel.open(file.fileno(), trusted)
        key, new_state = open_licence(licence, sealed, device, state, now)
        report = verify(sealed, sealed.unlock(key))
    if not report.authentic:
        raise SegmentNotAuthentic(f"bad: {[bad.segment.index for bad in report.bad]}")
    return report, new_state


def seal_unchecked(
    gguf: bytes,
    out: Path,
    vendor: VendorKey,
    *,
    model_id: str = "mallory",
    version: int = 1,
) -> Manifest:
    """What a trusted but malicious vendor can do: seal any bytes as a model, correctly signed.

    Content whose header can be read is laid out as its tensors ask, whatever they are; other content becomes
    META as a whole, beside an image of one page.
    """
    try:
        header = parse_header(gguf, len(gguf))
        content = content_of(gguf[: header.data_offset], header)
    except FlexServeError:
        about = Description("llama", "F32", 1, 1, 512, tied_output=False, has_chat_template=True)
        content = Content(gguf, len(gguf), 0, 4096, (TensorExtent(0, 64),), (0,), about)
    source = out.with_suffix(".source")
    source.write_bytes(gguf.ljust(64, b"\0"))
    fd = os.open(source, os.O_RDONLY)
    target = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        return write_sealed(fd, target, content, vendor, model_id=model_id, version=version)
    finally:
        os.close(fd)
        os.close(target)
        source.unlink()


def resign(data: bytes, vendor: VendorKey, change: Callable[[bytearray], None]) -> bytes:
    """A sealed file whose manifest was changed by its own vendor, and signed again."""
    (manifest_bytes,) = struct.unpack_from("<Q", data, 16)
    manifest = bytearray(data[:manifest_bytes])
    change(manifest)
    return bytes(manifest) + vendor.sign(bytes(manifest)) + data[manifest_bytes + SIGNATURE_BYTES :]


def put(offset: int, layout: str, *values: int | bytes) -> Callable[[bytearray], None]:
    """A change for `resign`: these values, little-endian, at this offset."""

    def change(manifest: bytearray) -> None:
        struct.pack_into("<" + layout, manifest, offset, *values)

    return change
