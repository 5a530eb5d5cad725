"""The execution layout of a model: what llama.cpp would repack, and the device's own copy made that way.

Plaintext is in private memory here, a mebibyte at a time: what is read is ciphertext, and so is what is written
(sealed.copying). Knows llama.cpp's choice only by asking it.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..core import PAGE_SIZE, DeviceCopyInfo
from ..errors import ModelMalformed, ModelUnsupported, NothingToRepack, Usage
from ..flexmem import ggml, repack, uffd
from ..sealed.copying import CHUNK_BYTES, CheckedImage, CopyWriter, PrivateBuffer, Progress, write_file
from ..sealed.device_copy import (
    COPY_ID_BYTES,
    CopyManifest,
    CopyTensor,
    DeviceCopy,
    copy_cipher,
    encode,
    plan_copy,
)
from ..sealed.format import MAX_IMAGE_BYTES, MAX_SEGMENTS, TENSOR_ALIGNMENT, Region, RegionKind, round_up
from ..sealed.gguf import GGUFHeader
from ..sealed.keys import DeviceKey
from ..sealed.layout import EMBEDDING
from ..sealed.reader import SealedModel
from ..sealed.verify import check_inside
from .llama import Model

_names = itertools.count()


@dataclass(frozen=True)
class CopyFiles:
    """A copy that fits, and descriptors of its file (source.py); the caller closes them."""

    copy: DeviceCopy
    cached: int
    direct: int | None


def places(tensors: Sequence[CopyTensor], header: GGUFHeader) -> list[ggml.Place]:
    """Where llama.cpp finds the tensors of a copy."""
    return [ggml.Place(header.tensors[t.source].name, t.image_offset, t.length, t.repacked) for t in tensors]


def would_gain(header: GGUFHeader) -> bool:
    """Whether llama.cpp would repack a good part of this model, as far as can be said without loading it."""
    matrices = [t for t in header.tensors if len(t.shape) > 1 and t.name != EMBEDDING]
    gaining = [t for t in matrices if repack.repacks(t.type, t.shape[0], t.rows)]
    return 4 * sum(t.nbytes for t in gaining) > sum(t.nbytes for t in matrices)


def copy_info(sealed: SealedModel, manifest: CopyManifest) -> DeviceCopyInfo:
    """What may be said about a copy to the normal world."""
    repacked = [t for t in manifest.tensors if t.repacked]
    second = manifest.tensors[len(sealed.manifest.tensors) :]
    return DeviceCopyInfo(
        model_id=sealed.manifest.model_id,
        model_version=sealed.manifest.model_version,
        licence_serial=manifest.licence_serial,
        file_bytes=manifest.plan.file_bytes,
        weight_bytes=sum(r.length for r in manifest.plan.regions),
        repacked_bytes=sum(t.length for t in repacked),
        second_output_bytes=sum(t.length for t in second),
        tensors=len(sealed.manifest.tensors),
        repacked_tensors=len(repacked),
        engine=manifest.made_for.engine,
        cpu=manifest.made_for.cpu,
    )


def make_copy(
    sealed: SealedModel,
    model_key: bytes,
    out: int,
    *,
    serial: int,
    device: DeviceKey,
    progress: Progress = lambda _done, _total: None,
) -> CopyManifest:
    """Write the device's copy of a model into the empty file `out`; `serial` is the opened licence's.

    Every segment's SHA-256 is compared with the vendor's before it is decrypted. When this raises, what was
    written is worth nothing. Raises `Usage`, `NothingToRepack`, `SegmentNotAuthentic`, `ModelMalformed`,
    `ModelUnsupported`, `StorageFailure`.
    """
    reason = repack.why_not()
    if reason is not None:
        raise Usage(f"there is no execution layout on this machine: {reason}")
    source = CheckedImage(sealed.unlock(model_key))
    try:
        meta = source.meta()
        header = check_inside(sealed.manifest, meta)
        tensors, body_bytes = _tensors(header, sealed, _uses(meta, header, sealed))
        plan = plan_copy(sealed.region(RegionKind.EMBED).length, body_bytes, len(tensors))
        if plan.segment_count > MAX_SEGMENTS or plan.image_bytes > MAX_IMAGE_BYTES:
            raise ModelMalformed(f"the model is too large to copy: {plan.image_bytes} bytes")
        copy_id = secrets.token_bytes(COPY_ID_BYTES)
        writer = CopyWriter(out, plan, copy_cipher(device, model_key, copy_id, sealed), progress)
        filler = _Filler(header, sealed, source, writer)
        try:
            for region in plan.regions[1:]:
                filler.fill(region, tensors)
        finally:
            filler.close()
            writer.close()
    finally:
        source.close()
    manifest = CopyManifest(
        device_key_id=device.key_id,
        source_digest=sealed.digest,
        licence_serial=serial,
        copy_id=copy_id,
        made_at=int(time.time()),
        made_for=repack.this_engine(),
        plan=plan,
        tensors=tuple(tensors),
        tags=bytes(writer.tags),
    )
    write_file(out, encode(manifest, device), 0)
    return manifest


def _uses(meta: bytes, header: GGUFHeader, sealed: SealedModel) -> list[tuple[bool, bool]]:
    """For each tensor, whether llama.cpp wants it plain, and whether repacked: it loads the model's skeleton, and
    both places are on offer. No weight is read, and no memory is behind the addresses."""
    offered = [
        ggml.Place(tensor.name, extent.image_offset, extent.length, repacked)
        for tensor, extent in zip(header.tensors, sealed.manifest.tensors, strict=True)
        for repacked in (False, True)
    ]
    length = sealed.manifest.plan.image_bytes
    base = uffd.reserve(length)
    buffer_type = ggml.ArenaBufferType(f"flexmem-choice-{next(_names)}", base, offered)
    try:
        Model.from_skeleton(meta, sealed.manifest.gguf_bytes, buffer_type, repacked=True).close()
        return [
            (
                buffer_type.has_seen(tensor.name, repacked=False),
                buffer_type.has_seen(tensor.name, repacked=True),
            )
            for tensor in header.tensors
        ]
    finally:
        buffer_type.close()
        uffd.release(base, length)


def _tensors(
    header: GGUFHeader, sealed: SealedModel, uses: Sequence[tuple[bool, bool]]
) -> tuple[list[CopyTensor], int]:
    """The copy's tensors, and the length of its BODY. Raises `NothingToRepack`."""
    m = sealed.manifest
    if not any(repacked for _, repacked in uses):
        raise NothingToRepack(
            f"llama.cpp repacks nothing of {m.model_id} ({m.description.quantization}) on this processor"
        )
    tensors: list[CopyTensor] = []
    twice: list[CopyTensor] = []
    end = m.plan.image_bytes
    for source, ((plain, repacked), extent) in enumerate(zip(uses, m.tensors, strict=True)):
        embedding = header.tensors[source].name == EMBEDDING
        if plain and repacked and not embedding:
            raise ModelUnsupported(
                f"llama.cpp uses {header.tensors[source].name} in two layouts, which only a tied embedding does"
            )
        tensors.append(CopyTensor(extent.image_offset, extent.length, source, repacked and not embedding))
        if repacked and embedding:
            start = round_up(end, TENSOR_ALIGNMENT)
            twice.append(CopyTensor(start, extent.length, source, True))
            end = start + extent.length
    body = sealed.region(RegionKind.BODY)
    return tensors + twice, round_up(end - body.image_offset, PAGE_SIZE)


class _Filler:
    """Writes regions of a copy: tensors in the order of their places, repacked where they are to be."""

    def __init__(
        self, header: GGUFHeader, sealed: SealedModel, source: CheckedImage, writer: CopyWriter
    ) -> None:
        self._header = header
        self._extents = sealed.manifest.tensors
        self._source = source
        self._writer = writer
        self._buffers: dict[int, tuple[PrivateBuffer, PrivateBuffer]] = {}  # by size: few sizes occur
        self._repackers: dict[tuple[int, int, int], repack.Repacker] = {}

    def fill(self, region: Region, tensors: Sequence[CopyTensor]) -> None:
        """One region, from its first to its last byte; zeros where no tensor is."""
        at, end = region.image_offset, region.image_offset + region.length
        with self._writer.region(region):
            for tensor in sorted(t for t in tensors if at <= t.image_offset < end):
                self._writer.zeros(tensor.image_offset - at)
                at = tensor.image_offset + tensor.length
                if tensor.repacked:
                    self._repack(tensor.source)
                else:
                    self._copy(self._extents[tensor.source].image_offset, tensor.length)
            self._writer.zeros(end - at)

    def _copy(self, start: int, length: int) -> None:
        for done in range(0, length, CHUNK_BYTES):
            piece = self._two(CHUNK_BYTES)[0][: length - done]
            self._source.read(start + done, piece)
            self._writer.write(piece)

    def _repack(self, source: int) -> None:
        info, start = self._header.tensors[source], self._extents[source].image_offset
        rows = max(1, CHUNK_BYTES // (info.row_bytes * repack.CHUNK_ROWS)) * repack.CHUNK_ROWS
        for first in range(0, info.rows, rows):
            kind = (info.type, info.shape[0], min(rows, info.rows - first))
            if kind not in self._repackers:
                self._repackers[kind] = repack.Repacker(*kind)
            repacker = self._repackers[kind]
            plain, repacked = self._two(repacker.nbytes)
            self._source.read(start + first * info.row_bytes, plain)
            repacker.repack(plain, repacked)
            self._writer.write(repacked)

    def _two(self, size: int) -> tuple[memoryview, memoryview]:
        if size not in self._buffers:
            self._buffers[size] = (PrivateBuffer(size), PrivateBuffer(size))
        first, second = self._buffers[size]
        return first.view, second.view

    def close(self) -> None:
        """Zero every buffer."""
        for pair in self._buffers.values():
            for buffer in pair:
                buffer.close()
        for repacker in self._repackers.values():
            repacker.close()
