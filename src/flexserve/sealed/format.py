"""The manifest of a sealed model as bytes and as an object (docs/sealed-format.md, "Sealed model").

Knows every field, offset and rule of the format. Does no I/O and no cryptography: whether the bytes are
authentic has been decided before `decode_manifest` sees them (reader.py). Names in the spec are names here.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from ..core import PAGE_SIZE, ROW_UNIT_SIZE, SEGMENT_SIZE
from ..errors import SealedMalformed, SealedTruncated
from .crypto import SIGNATURE_BYTES, TAG_BYTES

MAGIC = b"FLEXSEAL"
FORMAT_VERSION = 1
HASH_BYTES = 32
NAME_BYTES = 64
SHORT_NAME_BYTES = 32
TENSOR_ALIGNMENT = 64

MAX_MANIFEST_BYTES = 50 << 20
MAX_META_BYTES = 64 << 20
MAX_IMAGE_BYTES = 1 << 40
MAX_TENSORS = 1 << 16
MAX_SEGMENTS = 1 << 20
MAX_TIME = 253402300799
MAX_INTEGER = (1 << 63) - 1

PREFIX = struct.Struct("<8sIIQQQ32s64s")
_HEAD = struct.Struct("<8sIIQQQ32s64s64sQ16sQQQ32s32sQIIIIII32s113s7s")
_REGION = struct.Struct("<IIQQQII")
TENSOR_ENTRY_BYTES = 16
SEGMENT_ENTRY_BYTES = TAG_BYTES + HASH_BYTES
HEAD_BYTES = 616
assert _HEAD.size + 3 * _REGION.size == HEAD_BYTES

_TIED_OUTPUT, _CHAT_TEMPLATE = 1, 2


class _Head(NamedTuple):
    """The head in file order."""

    magic: bytes
    format_version: int
    reserved_12: int
    manifest_bytes: int
    data_offset: int
    file_bytes: int
    vendor_key_id: bytes
    vendor_key: bytes
    model_id: bytes
    model_version: int
    sealing_id: bytes
    sealed_at: int
    gguf_bytes: int
    image_bytes: int
    architecture: bytes
    quantization: bytes
    parameters: int
    layers: int
    context_tokens: int
    flags: int
    tensor_count: int
    segment_count: int
    reserved_340: int
    key_commitment: bytes
    vendor_wrap: bytes
    reserved_489: bytes


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RegionKind(IntEnum):
    """The three parts of the data, in file order."""

    META = 1
    EMBED = 2
    BODY = 3


UNIT_BYTES = {
    RegionKind.META: SEGMENT_SIZE,
    RegionKind.EMBED: ROW_UNIT_SIZE,
    RegionKind.BODY: SEGMENT_SIZE,
}


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Region:
    """One part of the data; bytes. Its segments have consecutive indices from `first_segment`."""

    kind: RegionKind
    unit_bytes: int
    image_offset: int
    length: int
    file_offset: int
    first_segment: int
    segment_count: int

    @property
    def padded_bytes(self) -> int:
        """What the region takes in the file."""
        return round_up(self.length, PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """Where one segment is. `length` is padded, the length of its ciphertext and of its plaintext."""

    index: int
    kind: RegionKind
    file_offset: int
    length: int
    image_offset: int  # meaningless in META, which is not in the image


class TensorExtent(NamedTuple):
    """The bytes of one tensor in the image."""

    image_offset: int
    length: int


@dataclass(frozen=True)
class Plan:
    """Every offset of a sealed file, from the lengths of its parts."""

    manifest_bytes: int
    data_offset: int
    file_bytes: int
    image_bytes: int
    segment_count: int
    regions: tuple[Region, Region, Region]


def plan(meta_bytes: int, embed_bytes: int, body_bytes: int, tensor_count: int) -> Plan:
    """Lay a sealed file out. Writer and reader both compute this; the reader compares."""
    segments = sum(segment_counts(meta_bytes, embed_bytes, body_bytes))
    manifest_bytes = HEAD_BYTES + TENSOR_ENTRY_BYTES * tensor_count + SEGMENT_ENTRY_BYTES * segments
    return plan_data(meta_bytes, embed_bytes, body_bytes, manifest_bytes, SIGNATURE_BYTES)


def segment_counts(*lengths: int) -> list[int]:
    """How many segments META, EMBED and BODY of these lengths have."""
    return [-(-n // UNIT_BYTES[kind]) for n, kind in zip(lengths, RegionKind, strict=True)]


def plan_data(
    meta_bytes: int, embed_bytes: int, body_bytes: int, manifest_bytes: int, seal_bytes: int
) -> Plan:
    """Lay the data out behind a manifest and the `seal_bytes` that authenticate it. A region may be empty."""
    lengths = (meta_bytes, embed_bytes, body_bytes)
    data_offset = offset = round_up(manifest_bytes + seal_bytes, PAGE_SIZE)
    body_offset = round_up(embed_bytes, SEGMENT_SIZE)
    regions = []
    first = 0
    for kind, length, count in zip(RegionKind, lengths, segment_counts(*lengths), strict=True):
        image_offset = body_offset if kind is RegionKind.BODY else 0
        region = Region(kind, UNIT_BYTES[kind], image_offset, length, offset, first, count)
        regions.append(region)
        offset += region.padded_bytes
        first += count
    meta, embed, body = regions
    return Plan(manifest_bytes, data_offset, offset, body_offset + body_bytes, first, (meta, embed, body))


@dataclass(frozen=True)
class Description:
    """What `inspect` may tell anybody."""

    architecture: str
    quantization: str
    parameters: int
    layers: int
    context_tokens: int
    tied_output: bool
    has_chat_template: bool


@dataclass(frozen=True)
class Manifest:
    """Everything the vendor signs about a sealed model."""

    vendor_key_id: bytes
    vendor_point: bytes
    model_id: str
    model_version: int
    sealing_id: bytes
    sealed_at: int
    gguf_bytes: int
    description: Description
    key_commitment: bytes
    vendor_wrap: bytes
    plan: Plan
    tensors: tuple[TensorExtent, ...]  # in GGUF order
    segment_table: bytes

    def hash(self, index: int) -> bytes:
        """The signed SHA-256 of a segment's ciphertext."""
        start = index * SEGMENT_ENTRY_BYTES + TAG_BYTES
        return self.segment_table[start : start + HASH_BYTES]

    def region(self, kind: RegionKind) -> Region:
        return self.plan.regions[kind - 1]

    @property
    def is_adapter(self) -> bool:
        """An adapter has no embedding, and everything else has one. What is inside must agree."""
        return self.region(RegionKind.EMBED).length == 0

    @property
    def vendor_wrap_info(self) -> bytes:
        """The HPKE info of `vendor_wrap`."""
        return vendor_wrap_info(self.model_id, self.model_version, self.sealing_id, self.key_commitment)


def vendor_wrap_info(model_id: str, model_version: int, sealing_id: bytes, commitment: bytes) -> bytes:
    fields = struct.pack("<I64sQ16s", FORMAT_VERSION, encode_name(model_id), model_version, sealing_id)
    return b"FLEXWRAP" + fields + commitment


def is_name(text: str, limit: int = NAME_BYTES) -> bool:
    return len(text) <= limit and _NAME.fullmatch(text) is not None


def encode_name(text: str, size: int = NAME_BYTES) -> bytes:
    """The field of a name that passed `is_name`."""
    return text.encode("ascii").ljust(size, b"\0")


def decode_name(field: bytes) -> str | None:
    """The name in a field, or None if it is not one."""
    text = field.rstrip(b"\0").decode("latin-1")
    return text if is_name(text, len(field)) else None


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes to sign. Checks nothing: a writer that breaks a rule makes a file that is refused."""
    m, p, d = manifest, manifest.plan, manifest.description
    head = _Head(
        magic=MAGIC,
        format_version=FORMAT_VERSION,
        reserved_12=0,
        manifest_bytes=p.manifest_bytes,
        data_offset=p.data_offset,
        file_bytes=p.file_bytes,
        vendor_key_id=m.vendor_key_id,
        vendor_key=m.vendor_point,
        model_id=encode_name(m.model_id),
        model_version=m.model_version,
        sealing_id=m.sealing_id,
        sealed_at=m.sealed_at,
        gguf_bytes=m.gguf_bytes,
        image_bytes=p.image_bytes,
        architecture=encode_name(d.architecture, SHORT_NAME_BYTES),
        quantization=encode_name(d.quantization, SHORT_NAME_BYTES),
        parameters=d.parameters,
        layers=d.layers,
        context_tokens=d.context_tokens,
        flags=d.tied_output * _TIED_OUTPUT | d.has_chat_template * _CHAT_TEMPLATE,
        tensor_count=len(m.tensors),
        segment_count=p.segment_count,
        reserved_340=0,
        key_commitment=m.key_commitment,
        vendor_wrap=m.vendor_wrap,
        reserved_489=b"",
    )
    regions = [
        _REGION.pack(r.kind, r.unit_bytes, r.image_offset, r.length, r.file_offset, r.segment_count, 0)
        for r in p.regions
    ]
    tensors = [struct.pack("<QQ", *extent) for extent in m.tensors]
    return b"".join([_HEAD.pack(*head), *regions, *tensors, m.segment_table])


class Prefix(NamedTuple):
    """The few fields that are looked at before the signature is checked."""

    manifest_bytes: int
    data_offset: int
    file_bytes: int
    vendor_key_id: bytes
    vendor_point: bytes


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise SealedMalformed(f"the sealed model's {what}")


def decode_prefix(data: bytes, size: int) -> Prefix:
    """Check the first fields of a file of `size` bytes. `data` is its first 136 bytes, or all of it.

    Raises `SealedMalformed`, `SealedTruncated`.
    """
    if data.startswith(b"GGUF"):
        raise SealedMalformed(
            "this is a plain GGUF model, not a sealed one", hint="seal it first: `flexserve seal`"
        )
    if not data.startswith(MAGIC):
        raise SealedMalformed("this is not a sealed model: it does not begin with FLEXSEAL")
    if size < HEAD_BYTES or len(data) < PREFIX.size:
        raise SealedTruncated(f"the sealed model ends inside its head, after {size} bytes")
    _, version, reserved, manifest_bytes, data_offset, file_bytes, key_id, point = PREFIX.unpack_from(data)
    if version != FORMAT_VERSION:
        raise SealedMalformed(
            f"the sealed model has format version {version}; this FlexServe reads version {FORMAT_VERSION}",
            hint="update FlexServe, or ask the vendor for a file in this format",
        )
    _require(reserved == 0, "reserved field is not zero")
    _require(HEAD_BYTES <= manifest_bytes <= MAX_MANIFEST_BYTES, f"manifest_bytes is {manifest_bytes}")
    _require(
        data_offset == round_up(manifest_bytes + SIGNATURE_BYTES, PAGE_SIZE),
        f"data_offset is {data_offset}, which does not fit manifest_bytes",
    )
    if file_bytes != size:
        raise SealedTruncated(f"the sealed model has {size} bytes and says it has {file_bytes}")
    _require(file_bytes >= data_offset, f"file_bytes is {file_bytes}, less than data_offset")
    return Prefix(manifest_bytes, data_offset, file_bytes, key_id, point)


def decode_manifest(data: bytes) -> Manifest:
    """Check every rule of the format on an authentic manifest. Raises `SealedMalformed`."""
    h = _Head(*_HEAD.unpack_from(data))
    _require(h.magic == MAGIC and h.format_version == FORMAT_VERSION, "magic or format version is wrong")
    _require(not (h.reserved_12 or h.reserved_340 or any(h.reserved_489)), "reserved fields are not zero")
    model_id = decode_name(h.model_id)
    architecture = decode_name(h.architecture)
    quantization = decode_name(h.quantization)
    if model_id is None or architecture is None or quantization is None:
        raise SealedMalformed("the sealed model's model_id, architecture or quantization is not a name")
    _require(1 <= h.model_version <= MAX_INTEGER, f"model_version is {h.model_version}")
    _require(h.sealed_at <= MAX_TIME, f"sealed_at is {h.sealed_at}")
    _require(h.parameters <= MAX_INTEGER, f"parameters is {h.parameters}")
    _require(h.flags <= _TIED_OUTPUT | _CHAT_TEMPLATE, f"flags are {h.flags:#x}")
    _require(1 <= h.tensor_count <= MAX_TENSORS, f"tensor_count is {h.tensor_count}")
    _require(h.segment_count <= MAX_SEGMENTS, f"segment_count is {h.segment_count}")
    _require(len(data) == h.manifest_bytes, f"manifest_bytes is {h.manifest_bytes}")
    plan_ = _decode_regions(data, h.tensor_count)
    for field in ("manifest_bytes", "data_offset", "file_bytes", "image_bytes", "segment_count"):
        is_, must = getattr(h, field), getattr(plan_, field)
        _require(is_ == must, f"{field} is {is_}; its other fields make it {must}")
    meta = plan_.regions[0]
    _require(meta.length <= h.gguf_bytes <= MAX_IMAGE_BYTES, f"gguf_bytes is {h.gguf_bytes}")
    table = HEAD_BYTES + TENSOR_ENTRY_BYTES * h.tensor_count
    return Manifest(
        vendor_key_id=h.vendor_key_id,
        vendor_point=h.vendor_key,
        model_id=model_id,
        model_version=h.model_version,
        sealing_id=h.sealing_id,
        sealed_at=h.sealed_at,
        gguf_bytes=h.gguf_bytes,
        description=Description(
            architecture=architecture,
            quantization=quantization,
            parameters=h.parameters,
            layers=h.layers,
            context_tokens=h.context_tokens,
            tied_output=bool(h.flags & _TIED_OUTPUT),
            has_chat_template=bool(h.flags & _CHAT_TEMPLATE),
        ),
        key_commitment=h.key_commitment,
        vendor_wrap=h.vendor_wrap,
        plan=plan_,
        tensors=_decode_tensors(data[HEAD_BYTES:table], plan_),
        segment_table=data[table:],
    )


def _decode_regions(data: bytes, tensor_count: int) -> Plan:
    entries = list(_REGION.iter_unpack(data[_HEAD.size : HEAD_BYTES]))
    meta_bytes, embed_bytes, body_bytes = (entry[3] for entry in entries)
    _require(1 <= meta_bytes <= MAX_META_BYTES, f"META length is {meta_bytes}")
    for kind, length in (("EMBED", embed_bytes), ("BODY", body_bytes)):
        _require(length <= MAX_IMAGE_BYTES and length % PAGE_SIZE == 0, f"{kind} length is {length}")
    _require(body_bytes > 0, "BODY is empty")
    computed = plan(meta_bytes, embed_bytes, body_bytes, tensor_count)
    _require(computed.image_bytes <= MAX_IMAGE_BYTES, f"image is {computed.image_bytes} bytes")
    for entry, r in zip(entries, computed.regions, strict=True):
        expected = (r.kind, r.unit_bytes, r.image_offset, r.length, r.file_offset, r.segment_count, 0)
        _require(entry == expected, f"{r.kind.name} region is {entry}; it must be {expected}")
    return computed


def _decode_tensors(entries: bytes, plan_: Plan) -> tuple[TensorExtent, ...]:
    tensors = tuple(TensorExtent(*pair) for pair in struct.iter_unpack("<QQ", entries))
    _, embed, body = plan_.regions
    end = 0
    for number, (offset, length) in sorted(enumerate(tensors), key=lambda item: item[1]):
        what = f"tensor {number} at {offset}"
        _require(length > 0 and offset % TENSOR_ALIGNMENT == 0, f"{what} is empty or not aligned")
        _require(offset >= end, f"{what} overlaps another")
        end = offset + length
        inside_embed = end <= embed.length
        inside_body = offset >= body.image_offset and end <= plan_.image_bytes
        _require(inside_embed or inside_body, f"{what} with {length} bytes lies outside its region")
    return tensors
