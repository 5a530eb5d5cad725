"""A device's own copy of a sealed model, in execution layout (docs/sealed-format.md, "Device copy").

Knows the file's bytes, its keys and when a copy may be believed. Does not know what repacking is (flexmem.repack)
nor how a copy is filled (engine.layout). Whatever is wrong with a copy is one error, `DeviceCopyRefused`, because
the answer is always the same: the sealed model itself is used.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..core import PAGE_SIZE
from ..errors import DeviceCopyRefused, SealedTruncated, StorageFailure
from . import format as fmt
from .crypto import KEY_BYTES, TAG_BYTES, SegmentCipher, derive
from .format import Plan, Region, RegionKind, encode_name
from .keys import DeviceKey
from .reader import SealedModel, UnlockedImage, pread_exact

MAGIC = b"FLEXCOPY"
FORMAT_VERSION = 1
MAC_BYTES = 32
COPY_ID_BYTES = 32
ENGINE_BYTES, CPU_BYTES = 64, 256
SUFFIX = ".flexcopy"

_HEAD = struct.Struct("<8sIIQQQ32s32sQ32sQQII64s32s256s")
_REGION = struct.Struct("<IIQQQII")
_TENSOR = struct.Struct("<QQII")
HEAD_BYTES = 600
assert _HEAD.size + 2 * _REGION.size == HEAD_BYTES
_TEXT = re.compile(rb"[ -~]+\0*")
_PREFIX_BYTES = 72


class _Head(NamedTuple):
    """The head in file order."""

    magic: bytes
    format_version: int
    reserved_12: int
    manifest_bytes: int
    data_offset: int
    file_bytes: int
    device_key_id: bytes
    source_digest: bytes
    licence_serial: int
    copy_id: bytes
    made_at: int
    image_bytes: int
    tensor_count: int
    segment_count: int
    engine: bytes
    layout_digest: bytes
    cpu: bytes


def default_path(sealed: Path) -> Path:
    """Where a copy lies unless somebody says otherwise: beside the sealed model."""
    return sealed.with_suffix(SUFFIX)


@dataclass(frozen=True)
class Engine:
    """What repacked bytes are good for: the engine, the processor as it sees it, and the layout's fingerprint."""

    engine: str
    cpu: str
    layout_digest: bytes  # SHA-256 over what repacking makes of fixed patterns


class CopyTensor(NamedTuple):
    """One tensor of the copy. `source`: its number in the GGUF file; bytes in the copy's image."""

    image_offset: int
    length: int
    source: int
    repacked: bool


@dataclass(frozen=True)
class CopyManifest:
    """Everything a device says about its own copy."""

    device_key_id: bytes
    source_digest: bytes
    licence_serial: int
    copy_id: bytes
    made_at: int
    made_for: Engine
    plan: Plan  # its META is empty
    tensors: tuple[CopyTensor, ...]
    tags: bytes

    def region(self, kind: RegionKind) -> Region:
        return self.plan.regions[kind - 1]


def plan_copy(embed_bytes: int, body_bytes: int, tensor_count: int) -> Plan:
    """Every offset of a copy. Writer and reader both compute this; the reader compares."""
    segments = sum(fmt.segment_counts(0, embed_bytes, body_bytes))
    manifest_bytes = HEAD_BYTES + _TENSOR.size * tensor_count + TAG_BYTES * segments
    return fmt.plan_data(0, embed_bytes, body_bytes, manifest_bytes, MAC_BYTES)


def copy_cipher(device: DeviceKey, model_key: bytes, copy_id: bytes, sealed: SealedModel) -> SegmentCipher:
    """The copy's key needs two secrets: the device's, and the one that only a valid licence yields."""
    secret = device.derive(b"flexserve/v1/device-copy")
    key = derive(secret + model_key, copy_id, b"flexserve/v1/device-copy-key", KEY_BYTES)
    m = sealed.manifest
    return SegmentCipher(key, copy_id, encode_name(m.model_id), m.model_version, MAGIC)


def encode(manifest: CopyManifest, device: DeviceKey) -> bytes:
    """Everything before the data: manifest, MAC, zeros."""
    m, p = manifest, manifest.plan
    head = _HEAD.pack(
        *(MAGIC, FORMAT_VERSION, 0, p.manifest_bytes, p.data_offset, p.file_bytes),
        *(m.device_key_id, m.source_digest, m.licence_serial, m.copy_id, m.made_at),
        *(p.image_bytes, len(m.tensors), p.segment_count),
        *(m.made_for.engine.encode(), m.made_for.layout_digest, m.made_for.cpu.encode()),
    )
    regions = [_REGION.pack(*_region_fields(r)) for r in p.regions[1:]]
    tensors = [_TENSOR.pack(*tensor) for tensor in m.tensors]
    body = b"".join([head, *regions, *tensors, m.tags])
    return (body + _mac(device, body)).ljust(p.data_offset, b"\0")


def _region_fields(r: Region) -> tuple[int, ...]:
    return (r.kind, r.unit_bytes, r.image_offset, r.length, r.file_offset, r.segment_count, 0)


def _mac(device: DeviceKey, body: bytes) -> bytes:
    return hmac.new(device.derive(b"flexserve/v1/device-copy-manifest"), body, hashlib.sha256).digest()


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise DeviceCopyRefused(f"the device copy {what}")


class DeviceCopy(UnlockedImage):
    """A copy that fits: its manifest, and its segments to be decrypted."""

    def __init__(self, manifest: CopyManifest, cipher: SegmentCipher) -> None:
        """Use `open_copy`."""
        super().__init__(manifest.plan, manifest.tags, TAG_BYTES, cipher)
        self.manifest = manifest


def open_copy(
    fd: int, sealed: SealedModel, model_key: bytes, *, serial: int, device: DeviceKey, engine: Engine
) -> DeviceCopy:
    """Believe a copy of `sealed`, opened with `model_key` from the licence with `serial`, on this device.

    Raises `DeviceCopyRefused` saying why not. Source: docs/sealed-format.md, "Device copy", the last paragraph.
    """
    manifest = _read(fd, device)
    _require(
        manifest.source_digest == sealed.digest, "was made from another model, or another sealing of this one"
    )
    _require(
        manifest.licence_serial == serial,
        f"was made under another licence (serial {manifest.licence_serial}, this one has {serial})",
    )
    made_for = manifest.made_for
    _require(
        made_for.engine == engine.engine,
        f"was made for another engine ({made_for.engine}, this is {engine.engine})",
    )
    same_cpu = made_for.cpu == engine.cpu and made_for.layout_digest == engine.layout_digest
    _require(same_cpu, f"was made for another processor ({made_for.cpu})")
    _check_source(manifest, sealed)
    return DeviceCopy(manifest, copy_cipher(device, model_key, manifest.copy_id, sealed))


def _check_source(manifest: CopyManifest, sealed: SealedModel) -> None:
    """Every tensor once, where the sealed model has it; then maybe the embedding again, repacked."""
    m = sealed.manifest
    embed_bytes = m.region(RegionKind.EMBED).length
    of_source, more = manifest.tensors[: len(m.tensors)], manifest.tensors[len(m.tensors) :]
    found = [(t.source, t.image_offset, t.length) for t in of_source]
    _require(
        found == [(i, *extent) for i, extent in enumerate(m.tensors)], "has other tensors than the model"
    )
    rows_plain = not any(t.repacked and t.image_offset < embed_bytes for t in of_source)
    same = manifest.region(RegionKind.EMBED).length == embed_bytes
    _require(same and rows_plain, "has another embedding than the model")
    for tensor in more:
        second = tensor.repacked and tensor.image_offset >= m.plan.image_bytes
        source = tensor.source < len(m.tensors) and m.tensors[tensor.source]
        fits = source and source.image_offset < embed_bytes and source.length == tensor.length
        _require(len(more) == 1 and second and bool(fits), "has a tensor that the model has not")


def _read(fd: int, device: DeviceKey) -> CopyManifest:
    """The manifest, authentic and within every rule."""
    try:
        info = os.fstat(fd)
        _require(stat.S_ISREG(info.st_mode), "is not a regular file")
        head = bytearray(min(HEAD_BYTES, info.st_size))
        pread_exact(fd, memoryview(head), 0)
        _require(head.startswith(MAGIC), "is something else: it does not begin with FLEXCOPY")
        _require(len(head) == HEAD_BYTES, f"ends inside its head, after {info.st_size} bytes")
        version, reserved, manifest_bytes, data_offset, file_bytes = struct.unpack_from("<IIQQQ", head, 8)
        _require(version == FORMAT_VERSION and reserved == 0, f"has format version {version}")
        _require(HEAD_BYTES <= manifest_bytes <= fmt.MAX_MANIFEST_BYTES, "has an impossible manifest size")
        end = fmt.round_up(manifest_bytes + MAC_BYTES, PAGE_SIZE)
        _require(data_offset == end <= file_bytes, "has an impossible data offset")
        _require(file_bytes == info.st_size, f"has {info.st_size} bytes and says it has {file_bytes}")
        _require(bytes(head[40:_PREFIX_BYTES]) == device.key_id, "was made by another device")
        data = bytearray(data_offset)
        pread_exact(fd, memoryview(data), 0)
    except (OSError, StorageFailure, SealedTruncated) as error:
        raise DeviceCopyRefused(f"the device copy cannot be read: {error}") from error
    body, mac = bytes(data[:manifest_bytes]), bytes(data[manifest_bytes : manifest_bytes + MAC_BYTES])
    _require(hmac.compare_digest(mac, _mac(device, body)), "is not what this device wrote")
    _require(not any(data[manifest_bytes + MAC_BYTES :]), "has bytes between its MAC and its data")
    return _decode(body)


def _decode(body: bytes) -> CopyManifest:
    """Every rule of the format, on authentic bytes: the device wrote them, and checking is cheaper than doubting."""
    h = _Head(*_HEAD.unpack_from(body))
    _require(
        (h.magic, h.format_version, h.reserved_12) == (MAGIC, FORMAT_VERSION, 0), "has an impossible head"
    )
    _require(
        1 <= h.licence_serial <= fmt.MAX_INTEGER and h.made_at <= fmt.MAX_TIME, "has an impossible serial"
    )
    _require(all(_TEXT.fullmatch(text) for text in (h.engine, h.cpu)), "names no engine or processor")
    _require(1 <= h.tensor_count <= fmt.MAX_TENSORS + 1, f"has {h.tensor_count} tensors")
    _require(h.segment_count <= fmt.MAX_SEGMENTS, f"has {h.segment_count} segments")
    entries = list(_REGION.iter_unpack(body[_HEAD.size : HEAD_BYTES]))
    embed_bytes, body_bytes = (entry[3] for entry in entries)
    for length in (embed_bytes, body_bytes):
        _require(length <= fmt.MAX_IMAGE_BYTES and length % PAGE_SIZE == 0, "has impossible regions")
    _require(body_bytes > 0, "has no body")
    plan = plan_copy(embed_bytes, body_bytes, h.tensor_count)
    _require(plan.image_bytes <= fmt.MAX_IMAGE_BYTES, "is too large")
    _require(entries == [_region_fields(r) for r in plan.regions[1:]], "has impossible regions")
    said = (h.manifest_bytes, h.data_offset, h.file_bytes, h.image_bytes, h.segment_count)
    must = (plan.manifest_bytes, plan.data_offset, plan.file_bytes, plan.image_bytes, plan.segment_count)
    _require(said == must and len(body) == h.manifest_bytes, "has sizes that do not fit each other")
    table = HEAD_BYTES + _TENSOR.size * h.tensor_count
    tensors = []
    for offset, length, source, layout in _TENSOR.iter_unpack(body[HEAD_BYTES:table]):
        _require(layout in (0, 1), "has a tensor of an unknown layout")
        tensors.append(CopyTensor(offset, length, source, bool(layout)))
    _check_places(tensors, plan)
    return CopyManifest(
        device_key_id=h.device_key_id,
        source_digest=h.source_digest,
        licence_serial=h.licence_serial,
        copy_id=h.copy_id,
        made_at=h.made_at,
        made_for=Engine(h.engine.rstrip(b"\0").decode(), h.cpu.rstrip(b"\0").decode(), h.layout_digest),
        plan=plan,
        tensors=tuple(tensors),
        tags=body[table:],
    )


def _check_places(tensors: Sequence[CopyTensor], plan: Plan) -> None:
    _, embed, body = plan.regions
    end = 0
    for offset, length, _, _ in sorted(tensors):
        _require(
            length > 0 and offset % fmt.TENSOR_ALIGNMENT == 0, "has a tensor that is empty or not aligned"
        )
        _require(offset >= end, "has tensors that overlap")
        end = offset + length
        inside = end <= embed.length or (offset >= body.image_offset and end <= plan.image_bytes)
        _require(inside, "has a tensor outside its region")
