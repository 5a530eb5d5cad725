"""From storage to plaintext, with storage at its worst."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexserve.core import PAGE_SIZE
from flexserve.errors import SegmentNotAuthentic
from flexserve.flexmem import uffd
from flexserve.flexmem.arena import Arena, Span
from flexserve.flexmem.source import SLOTS, SealedSource, Staging
from flexserve.sealed.gguf import read_header
from flexserve.sealed.layout import plan_layout
from flexserve.sealed.reader import SealedModel, UnlockedModel

from ..sealed_fixtures import SMALL, Kit, make_kit, model_key

EMBED, BODY, ALL_EMBED = Span(1, 1, 0, 16384), Span(10, 1, 1 << 20, 1 << 20), Span(1, 9, 0, 139264)
Preadv = Callable[..., int]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return make_kit(tmp_path_factory.mktemp("source"), SMALL)


@pytest.fixture(scope="module")
def image(kit: Kit) -> bytes:
    """What the plaintext should be, from the GGUF file and the layout alone."""
    _, header = read_header(kit.gguf)
    layout = plan_layout(header)
    data = kit.gguf.read_bytes()[header.data_offset :]
    out = bytearray(layout.image_bytes)
    for tensor, place in zip(header.tensors, layout.placements, strict=True):
        out[place.image_offset : place.end] = data[tensor.offset : tensor.offset + tensor.nbytes]
    return bytes(out)


class Opened:
    """A copy of the sealed file, open as the normal world opens it."""

    def __init__(self, kit: Kit, path: Path) -> None:
        shutil.copy(kit.flex, path)
        self.path = path
        self.cached = os.open(path, os.O_RDONLY)
        self.direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
        sealed = SealedModel.open(self.cached, [kit.vendor.public])
        self.model: UnlockedModel = sealed.unlock(model_key(kit.flex, kit.vendor))
        self.staging = Staging()

    def source(self, *, direct: bool = True) -> SealedSource:
        return SealedSource(self.model, self.cached, self.direct if direct else None)

    def close(self) -> None:
        os.close(self.cached)
        os.close(self.direct)


@pytest.fixture
def opened(kit: Kit, tmp_path: Path) -> Iterator[Opened]:
    made = Opened(kit, tmp_path / "m.flex")
    yield made
    made.close()


def plaintext(opened: Opened, source: SealedSource, span: Span) -> bytes:
    source.fetch(span, opened.staging)
    return bytes(opened.staging.plain[: span.length])


def test_the_spans_of_this_test_are_the_models(kit: Kit) -> None:
    arena = Arena(kit.manifest.plan.regions[1:], None)
    assert [arena.span(1), arena.span(10), arena.span(1, 9)] == [EMBED, BODY, ALL_EMBED]
    arena.close()


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "no O_DIRECT"])
@pytest.mark.parametrize("span", [EMBED, BODY, ALL_EMBED, Span(11, 1, 2 << 20, 978944)])
def test_plaintext_is_what_the_model_says(opened: Opened, image: bytes, span: Span, direct: bool) -> None:
    assert plaintext(opened, opened.source(direct=direct), span) == image[span.offset :][: span.length]


def evict(opened: Opened) -> None:
    os.fsync(opened.cached)
    os.posix_fadvise(opened.cached, 0, 0, os.POSIX_FADV_DONTNEED)
    assert uffd.cached_bytes(opened.cached, 0, 1 << 30) == 0


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The descriptor of every read."""
    seen: list[int] = []
    preadv: Preadv = os.preadv

    def noted(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        seen.append(fd)
        return preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", noted)
    return seen


def test_a_cold_file_is_read_past_the_page_cache_and_leaves_it_empty(
    opened: Opened, image: bytes, descriptors: list[int]
) -> None:
    evict(opened)
    assert plaintext(opened, opened.source(), BODY) == image[BODY.offset :][: BODY.length]
    assert descriptors == [opened.direct]
    assert uffd.cached_bytes(opened.cached, 0, 1 << 30) == 0


def test_a_cached_segment_is_read_from_the_page_cache(
    opened: Opened, image: bytes, descriptors: list[int]
) -> None:
    start = opened.model.segments[10].file_offset
    evict(opened)
    os.pread(opened.cached, BODY.length, start)
    assert plaintext(opened, opened.source(), BODY) == image[BODY.offset :][: BODY.length]
    assert descriptors == [opened.cached]


def test_a_kernel_that_does_not_tell_what_is_cached_gets_direct_reads(
    opened: Opened, image: bytes, descriptors: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.pread(opened.cached, 1 << 24, 0)
    monkeypatch.setattr(uffd, "_SYS_CACHESTAT", 100_000)  # ENOSYS
    assert plaintext(opened, opened.source(), BODY) == image[BODY.offset :][: BODY.length]
    assert descriptors == [opened.direct]


@pytest.mark.parametrize("direct", [True, False])
def test_short_reads_are_continued(
    opened: Opened, image: bytes, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    preadv: Preadv = os.preadv
    calls: list[int] = []

    def short(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        calls.append(fd)
        return preadv(fd, [buffers[0][:65536]], offset)

    monkeypatch.setattr(os, "preadv", short)
    assert plaintext(opened, opened.source(direct=direct), BODY) == image[BODY.offset :][: BODY.length]
    assert len(calls) > 10


def test_direct_reads_that_want_another_alignment_are_given_up(
    opened: Opened, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv: Preadv = os.preadv
    tried: list[int] = []

    def picky(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if fd == opened.direct:
            tried.append(fd)
            raise OSError(errno.EINVAL, "alignment")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", picky)
    evict(opened)
    source = opened.source()
    for _ in range(3):
        assert plaintext(opened, source, BODY) == image[BODY.offset :][: BODY.length]
    assert len(tried) == 1


def test_a_read_error_is_a_segment_that_cannot_be_had(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    for direct in (True, False):
        with pytest.raises(SegmentNotAuthentic, match=r"segment 10 .*Input/output error"):
            opened.source(direct=direct).fetch(BODY, opened.staging)


@pytest.mark.parametrize("direct", [True, False])
def test_a_truncated_file_is_a_segment_that_cannot_be_had(opened: Opened, direct: bool) -> None:
    os.truncate(opened.path, opened.model.segments[11].file_offset + 5000)
    with pytest.raises(SegmentNotAuthentic, match=r"segment 11 cannot be read: .*became shorter"):
        opened.source(direct=direct).fetch(Span(11, 1, 2 << 20, 978944), opened.staging)


@pytest.mark.parametrize("bad", range(1, 10))
def test_one_flipped_bit_fails_its_run_and_leaves_no_plaintext_of_its_segment(
    opened: Opened, bad: int
) -> None:
    at = opened.model.segments[bad].file_offset + 777
    with opened.path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 4]))
        file.flush()
        os.fsync(file.fileno())
    with pytest.raises(SegmentNotAuthentic, match=f"segment {bad} "):
        opened.source().fetch(ALL_EMBED, opened.staging)
    start = opened.model.segments[bad].image_offset
    assert not any(opened.staging.plain[start : start + opened.model.segments[bad].length])


def test_a_file_replaced_under_its_name_changes_nothing(opened: Opened, image: bytes) -> None:
    """The descriptor is the file."""
    other = opened.path.with_suffix(".other")
    other.write_bytes(b"junk" * 100_000)
    other.replace(opened.path)
    assert plaintext(opened, opened.source(), BODY) == image[BODY.offset :][: BODY.length]


def test_content_replaced_in_place_is_not_authentic(opened: Opened) -> None:
    size = opened.path.stat().st_size
    with opened.path.open("r+b") as file:
        file.write(b"\x5a" * size)
        file.flush()
        os.fsync(file.fileno())
    for direct in (True, False):
        with pytest.raises(SegmentNotAuthentic):
            opened.source(direct=direct).fetch(EMBED, opened.staging)


# Staging


@pytest.fixture
def staging() -> Iterator[Staging]:
    made = Staging()
    yield made
    made.close()


def test_plaintext_that_the_kernel_did_not_move_is_zeroed_where_it_stays(staging: Staging) -> None:
    old = staging.plain
    staging.used = True
    old[:] = b"\x5a" * uffd.HUGE_PAGE
    staging.moved(3 * PAGE_SIZE)
    assert staging.address == staging._slots + uffd.HUGE_PAGE
    assert not any(old[3 * PAGE_SIZE :])


def test_the_slots_come_round_with_no_memory_behind_them(staging: Staging) -> None:
    first = staging.address
    for number in range(SLOTS):
        assert staging.address == first + number * uffd.HUGE_PAGE
        staging.plain[0] = 1
        staging.moved(uffd.HUGE_PAGE)
    assert staging.address == first
    assert not any(uffd.resident_pages(first, SLOTS * uffd.HUGE_PAGE))
    assert staging.plain[0] == 0
