"""Seals a GGUF file: reads it once, encrypts in two threads, and the result appears whole or not at all.

Knows the order of the steps and how to overlap them. The bytes' meaning is format.py's, their places in the
image layout.py's. Memory does not grow with the model.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..core import SEGMENT_SIZE
from ..errors import ModelMalformed, StorageFailure, Usage
from . import format as fmt
from .adapter_rules import check_adapter, is_adapter
from .crypto import KEY_BYTES, TAG_BYTES, SegmentCipher, key_commitment
from .files import BulkWriter, page_buffer, pwrite_all, replacing
from .format import Description, Manifest, Plan, Region, RegionKind, TensorExtent
from .gguf import GGUFHeader, check_model, describe
from .keys import VendorKey
from .layout import plan_adapter, plan_layout
from .model_rules import NOT_REVIEWED
from .split import open_source
from .workers import run_workers

THREADS = 3  # two compute while one waits for the storage
CHUNK_BYTES = SEGMENT_SIZE  # a multiple of every unit; what a thread works on at a time

Progress = Callable[[int, int], None]  # bytes done, bytes in total


@dataclass(frozen=True)
class Content:
    """What is sealed, whoever checked it: `seal` from a checked GGUF, tests also from a hostile one."""

    meta: bytes
    gguf_bytes: int
    embed_bytes: int
    body_bytes: int
    tensors: tuple[TensorExtent, ...]  # image places, in GGUF order
    file_offsets: tuple[int, ...]  # of the same tensors in the GGUF file
    description: Description
    part_of: tuple[
        int, ...
    ] = ()  # which part of a split model each tensor is in, counted from 0; none: not split


def seal(
    gguf_path: Path,
    out_path: Path,
    vendor: VendorKey,
    model_id: str | None = None,
    version: int = 1,
    *,
    progress: Progress | None = None,
    trial: Callable[[Path, str], None] | None = None,
) -> Manifest:
    """Seal a model or a LoRA adapter into a new file, replacing `out_path` only when everything is written and synced.

    Of a split model `gguf_path` is the first part; the others are found by their names. Without `model_id` it is
    made from the file's `general.name`, or its own name. `progress` is called a few times per second from this
    thread. `trial(path, architecture)` is called for a model whose architecture only has the general rules: it may
    refuse it by raising. Raises `Usage`, `NotFound`, `ModelMalformed`, `ModelUnsupported`,
    `StorageFailure`; then, and on KeyboardInterrupt, no file is left.
    """
    if not 1 <= version <= fmt.MAX_INTEGER:
        raise Usage(f"the model version is {version}: it must be 1 to {fmt.MAX_INTEGER}")
    if model_id is not None and not fmt.is_name(model_id):
        raise Usage(
            f"{model_id!r} cannot be a model id",
            hint="1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit",
        )
    with ExitStack() as stack:
        stack.enter_context(_whoever_seals_can_mend_it())
        source = open_source(gguf_path, stack)
        if out_path.exists() and any(os.path.samestat(out_path.stat(), os.fstat(f)) for f in source.files):
            raise Usage(f"{out_path} is the model itself", hint="give another name with -o")
        adapter = is_adapter(source.header)
        (check_adapter if adapter else check_model)(source.header)
        if trial is not None and not adapter and source.header.architecture in NOT_REVIEWED:
            trial(gguf_path, source.header.architecture)
        content = replace(
            content_of(source.meta, source.header), file_offsets=source.offsets, part_of=source.part_of
        )
        name = model_id or default_model_id(describe(source.header).name, gguf_path.stem)
        with replacing(out_path) as out:
            return write_sealed(
                source.files, out, content, vendor, model_id=name, version=version, progress=progress
            )


@contextmanager
def _whoever_seals_can_mend_it() -> Iterator[None]:
    """A broken model has another hint for the vendor than for a device."""
    try:
        yield
    except ModelMalformed as error:
        if error.hint == ModelMalformed.default_hint:
            error.hint = "give a whole, plain GGUF file: this one may be cut off, damaged or sealed already"
        raise


def content_of(meta: bytes, header: GGUFHeader) -> Content:
    """What sealing needs to know of a checked header. Raises `ModelMalformed`."""
    layout = plan_adapter(header) if is_adapter(header) else plan_layout(header)
    about = describe(header)
    return Content(
        meta=meta,
        gguf_bytes=header.file_bytes,
        embed_bytes=layout.embed_bytes,
        body_bytes=layout.body_bytes,
        tensors=tuple(TensorExtent(p.image_offset, p.nbytes) for p in layout.placements),
        file_offsets=tuple(header.data_offset + t.offset for t in header.tensors),
        description=Description(
            architecture=_short_name(about.architecture),
            quantization=_short_name(about.quantization),
            parameters=about.parameters,
            layers=about.layers,
            context_tokens=about.context_tokens,
            tied_output=layout.tied_output,
            has_chat_template=about.has_chat_template,
        ),
    )


def default_model_id(general_name: str, stem: str) -> str:
    """The first of the two that makes a name, in lower case with dashes; `model` if neither does."""
    for text in (general_name, stem):
        slug = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[: fmt.NAME_BYTES].rstrip("-._")
        if slug:
            return slug
    return "model"


def _short_name(text: str) -> str:
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("-._")[: fmt.SHORT_NAME_BYTES]
    return slug or "unknown"


def write_sealed(
    source: int | Sequence[int],
    out: int,
    content: Content,
    vendor: VendorKey,
    *,
    model_id: str,
    version: int,
    model_key: bytes | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write a whole sealed file to the empty file `out`; `source` is the GGUF file, or all parts of it.

    `model_key` is for tests and vectors: elsewhere every sealing makes its own.
    """
    key = model_key or secrets.token_bytes(KEY_BYTES)
    sealing_id = secrets.token_bytes(16)
    commitment = key_commitment(key, sealing_id)
    layout = fmt.plan(len(content.meta), content.embed_bytes, content.body_bytes, len(content.tensors))
    if layout.segment_count > fmt.MAX_SEGMENTS or layout.image_bytes > fmt.MAX_IMAGE_BYTES:
        raise ModelMalformed(f"the model is too large to seal: {layout.image_bytes} bytes")
    cipher = SegmentCipher(key, sealing_id, fmt.encode_name(model_id), version)
    info = fmt.vendor_wrap_info(model_id, version, sealing_id, commitment)
    sources = [source] if isinstance(source, int) else source
    table = _Encryptor(sources, out, content, layout, cipher).run(progress)
    manifest = Manifest(
        vendor_key_id=vendor.public.key_id,
        vendor_point=vendor.public.point,
        model_id=model_id,
        model_version=version,
        sealing_id=sealing_id,
        sealed_at=int(time.time()),
        gguf_bytes=content.gguf_bytes,
        description=content.description,
        key_commitment=commitment,
        vendor_wrap=vendor.wrap(key, info),
        plan=layout,
        tensors=content.tensors,
        segment_table=table,
    )
    signed = fmt.encode_manifest(manifest)
    pwrite_all(out, (signed + vendor.sign(signed)).ljust(layout.data_offset, b"\0"), 0)
    return manifest


class _Image:
    """The plaintext of the regions, gathered from the GGUF file."""

    def __init__(self, sources: Sequence[int], content: Content) -> None:
        self._meta = content.meta
        order = sorted(range(len(content.tensors)), key=lambda i: content.tensors[i])
        parts = content.part_of or (0,) * len(content.tensors)
        self._extents = [(*content.tensors[i], sources[parts[i]], content.file_offsets[i]) for i in order]
        self._starts = [start for start, *_ in self._extents]

    def read(self, region: Region, start: int, out: memoryview) -> None:
        """Fill `out` with the region's bytes from `start`, zeros where no tensor is."""
        if region.kind is RegionKind.META:
            piece = self._meta[start : start + len(out)]
            out[: len(piece)] = piece
            out[len(piece) :] = bytes(len(out) - len(piece))
            return
        begin = region.image_offset + start
        end = begin + len(out)
        done = begin
        for offset, length, source, file_offset in self._extents[
            max(0, bisect_right(self._starts, begin) - 1) :
        ]:
            if offset >= end:
                break
            first, last = max(offset, begin), min(offset + length, end)
            if first >= last:
                continue
            out[done - begin : first - begin] = bytes(first - done)
            self._pread(source, out[first - begin : last - begin], file_offset + first - offset)
            done = last
        out[done - begin :] = bytes(end - done)

    @staticmethod
    def _pread(source: int, out: memoryview, offset: int) -> None:
        while out:
            try:
                count = os.preadv(source, [out], offset)
            except OSError as error:
                raise StorageFailure(f"cannot read the model file: {error.strerror}") from error
            if count == 0:
                raise ModelMalformed("the model file became shorter while it was sealed")
            out, offset = out[count:], offset + count


class _Encryptor:
    """Encrypts all segments with a few threads: each reads, encrypts, hashes, writes one chunk at a time."""

    def __init__(
        self, sources: Sequence[int], out: int, content: Content, layout: Plan, cipher: SegmentCipher
    ) -> None:
        self._image = _Image(sources, content)
        self._out = BulkWriter(out)
        self._cipher = cipher
        self._table = memoryview(bytearray(fmt.SEGMENT_ENTRY_BYTES * layout.segment_count))
        self._total = layout.file_bytes - layout.data_offset
        self._chunks = self._chunks_of(layout.regions)
        self._lock = threading.Lock()
        self._done = 0
        self._stop = False

    @staticmethod
    def _chunks_of(regions: Sequence[Region]) -> Iterator[tuple[Region, int, int]]:
        for region in regions:
            for start in range(0, region.padded_bytes, CHUNK_BYTES):
                yield region, start, min(CHUNK_BYTES, region.padded_bytes - start)

    def run(self, progress: Progress | None) -> bytes:
        """Returns the segment table. An error or an interrupt stops all threads first."""

        def tick() -> None:
            if progress is not None:
                progress(self._done, self._total)

        try:
            run_workers(self._work, THREADS, "seal", tick=tick, stop=self._end)
        finally:
            self._out.close()
        return bytes(self._table)

    def _end(self) -> None:
        self._stop = True

    def _work(self) -> None:
        plaintext = page_buffer(CHUNK_BYTES)
        ciphertext = page_buffer(CHUNK_BYTES + TAG_BYTES)
        try:
            while not self._stop:
                with self._lock:
                    chunk = next(self._chunks, None)
                if chunk is None:
                    return
                region, start, length = chunk
                self._image.read(region, start, plaintext[:length])
                self._encrypt(region, start, plaintext[:length], ciphertext)
                self._out.write(ciphertext[:length], region.file_offset + start)
                with self._lock:
                    self._done += length
        except BaseException:
            self._stop = True
            raise

    def _encrypt(self, region: Region, start: int, plaintext: memoryview, out: memoryview) -> None:
        index = region.first_segment + start // region.unit_bytes
        for at in range(0, len(plaintext), region.unit_bytes):
            unit = plaintext[at : at + region.unit_bytes]
            end = at + len(unit)
            # The tag lands where the next unit's ciphertext will be, so it is taken at once.
            self._cipher.encrypt_into(region.kind, index, unit, len(unit), out[at : end + TAG_BYTES])
            entry = index * fmt.SEGMENT_ENTRY_BYTES
            self._table[entry : entry + TAG_BYTES] = out[end : end + TAG_BYTES]
            digest = hashlib.sha256(out[at:end]).digest()
            self._table[entry + TAG_BYTES : entry + fmt.SEGMENT_ENTRY_BYTES] = digest
            index += 1
