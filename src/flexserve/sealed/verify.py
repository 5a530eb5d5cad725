"""The full check of a sealed model: every hash, every tag, and whether the inside is a consistent model.

A start checks tags only, and only of what it reads; this reads everything. With no key it can still check
the hashes, which is what a mirror or an import needs.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from ..errors import ModelMalformed, ModelUnsupported, SealedTruncated, SegmentNotAuthentic, StorageFailure
from .adapter_rules import check_adapter, is_adapter
from .crypto import TAG_BYTES
from .format import UNIT_BYTES, Manifest, RegionKind, SegmentRef
from .gguf import GGUFHeader, check_model, parse_header
from .layout import Layout, plan_adapter, plan_layout
from .reader import SealedModel, UnlockedModel, pread_exact
from .workers import run_workers

THREADS = 2
Problem = Literal["unreadable", "hash", "tag"]
Progress = Callable[[int, int], None]  # bytes done, bytes in total


@dataclass(frozen=True)
class BadSegment:
    """A segment that is not what the vendor signed, and the tensors that need it (none for META)."""

    segment: SegmentRef
    problem: Problem
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What `verify` found. `tags_checked` is False when there was no key."""

    segments: int
    checked_bytes: int
    tags_checked: bool
    bad: tuple[BadSegment, ...]

    @property
    def authentic(self) -> bool:
        return not self.bad


def verify(
    sealed: SealedModel, unlocked: UnlockedModel | None = None, *, progress: Progress | None = None
) -> Report:
    """Check every segment; with a key the tags too, and that META is a valid header whose layout is the map.

    Bad segments are reported, not raised. Raises `ModelMalformed` or `ModelUnsupported` for an authentic file
    with a broken model inside. `progress` is called a few times per second from this thread.
    """
    problems = _Checker(sealed, unlocked).run(progress)
    names: tuple[str, ...] = ()
    meta = sealed.region(RegionKind.META)
    if unlocked is not None and not any(index < meta.segment_count for index in problems):
        check = check_adapter_inside if sealed.manifest.is_adapter else check_inside
        header = check(sealed.manifest, unlocked.gguf_header())
        names = tuple(tensor.name for tensor in header.tensors)
    tensors_in = _tensors_by_place(sealed.manifest, names)
    bad = tuple(
        BadSegment(sealed.segments[i], problem, tensors_in(sealed.segments[i]))
        for i, problem in sorted(problems.items())
    )
    total = sealed.manifest.plan.file_bytes - sealed.manifest.plan.data_offset
    return Report(len(sealed.segments), total, unlocked is not None, bad)


def check_inside(manifest: Manifest, meta: bytes) -> GGUFHeader:
    """The checked GGUF header of a model, if authentic META fits the manifest. Raises `ModelMalformed`,
    `ModelUnsupported` for what cannot be served, an adapter among others."""
    header = parse_header(meta, manifest.gguf_bytes)
    check_model(header)
    _check_places(manifest, meta, header, plan_layout(header))
    return header


def check_adapter_inside(manifest: Manifest, meta: bytes) -> GGUFHeader:
    """The same of an adapter. Raises `ModelMalformed`, `ModelUnsupported`."""
    header = parse_header(meta, manifest.gguf_bytes)
    if not is_adapter(header):
        if manifest.is_adapter:
            raise ModelMalformed(
                "neither a model, which has an embedding, nor an adapter, which says that it is one"
            )
        raise ModelUnsupported("this is no adapter: key 'general.type' says nothing of one")
    check_adapter(header)
    _check_places(manifest, meta, header, plan_adapter(header))
    return header


def _check_places(manifest: Manifest, meta: bytes, header: GGUFHeader, layout: Layout) -> None:
    regions = manifest.plan.regions
    sizes = (layout.embed_bytes, layout.body_bytes)
    if header.data_offset != len(meta) or sizes != (regions[1].length, regions[2].length):
        raise ModelMalformed("the sealed model's regions are not those of the model inside")
    if tuple((p.image_offset, p.nbytes) for p in layout.placements) != manifest.tensors:
        raise ModelMalformed("the sealed model's tensor map is not that of the model inside")


def _tensors_by_place(manifest: Manifest, names: tuple[str, ...]) -> Callable[[SegmentRef], tuple[str, ...]]:
    """A function from a segment to the names of the tensors in it; no names, no tensors."""
    order = sorted(range(len(names)), key=lambda i: manifest.tensors[i])
    starts = [manifest.tensors[i].image_offset for i in order]

    def tensors_in(segment: SegmentRef) -> tuple[str, ...]:
        if segment.kind is RegionKind.META:
            return ()
        first = max(0, bisect_right(starts, segment.image_offset) - 1)
        last = bisect_right(starts, segment.image_offset + segment.length - 1)
        return tuple(names[i] for i in order[first:last] if sum(manifest.tensors[i]) > segment.image_offset)

    return tensors_in


class _Checker:
    """Reads the data once with a few threads, a chunk of up to 1 MiB at a time."""

    def __init__(self, sealed: SealedModel, unlocked: UnlockedModel | None) -> None:
        self._sealed = sealed
        self._unlocked = unlocked
        self._problems: dict[int, Problem] = {}
        self._chunks = self._chunks_of()
        self._lock = threading.Lock()
        self._done = 0
        self._stop = False

    def _chunks_of(self) -> Iterator[range]:
        for region in self._sealed.manifest.plan.regions:
            step = max(UNIT_BYTES.values()) // region.unit_bytes
            end = region.first_segment + region.segment_count
            for first in range(region.first_segment, end, step):
                yield range(first, min(first + step, end))

    def run(self, progress: Progress | None) -> dict[int, Problem]:
        plan = self._sealed.manifest.plan

        def tick() -> None:
            if progress is not None:
                progress(self._done, plan.file_bytes - plan.data_offset)

        run_workers(self._work, THREADS, "verify", tick=tick, stop=self._end)
        return self._problems

    def _end(self) -> None:
        self._stop = True

    def _work(self) -> None:
        ciphertext = memoryview(bytearray(max(UNIT_BYTES.values()) + TAG_BYTES))
        out = memoryview(bytearray(max(UNIT_BYTES.values())))
        while not self._stop:
            with self._lock:
                chunk = next(self._chunks, None)
            if chunk is None:
                return
            for index in chunk:
                segment = self._sealed.segments[index]
                problem = self._check(
                    segment, ciphertext[: segment.length + TAG_BYTES], out[: segment.length]
                )
                with self._lock:
                    self._done += segment.length
                    if problem is not None:
                        self._problems[index] = problem

    def _check(self, segment: SegmentRef, ciphertext: memoryview, out: memoryview) -> Problem | None:
        try:
            pread_exact(self._sealed.fd, ciphertext[: segment.length], segment.file_offset)
        except (StorageFailure, SealedTruncated):
            return "unreadable"
        manifest = self._sealed.manifest
        if hashlib.sha256(ciphertext[: segment.length]).digest() != manifest.hash(segment.index):
            return "hash"
        if self._unlocked is None:
            return None
        try:
            self._unlocked.decrypt_into(segment.index, ciphertext, out)
        except SegmentNotAuthentic:
            return "tag"
        self._check_padding(segment, out)
        return None

    def _check_padding(self, segment: SegmentRef, out: memoryview) -> None:
        meta = self._sealed.region(RegionKind.META)
        if segment.kind is RegionKind.META and segment.index == meta.segment_count - 1:
            used = meta.length - (meta.segment_count - 1) * meta.unit_bytes
            if any(out[used:]):
                raise ModelMalformed("the sealed model's header is followed by bytes that are not zero")
