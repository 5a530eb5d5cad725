from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from flexserve.errors import FlexServeError, ModelMalformed
from flexserve.sealed.format import RegionKind, encode_name, vendor_wrap_info
from flexserve.sealed.reader import SealedModel
from flexserve.sealed.verify import Report, verify

from ..sealed_fixtures import Kit, model_key


def report_of(kit: Kit, flex: Path, *, with_key: bool = True) -> Report:
    with flex.open("rb") as file:
        sealed = SealedModel.open(file.fileno(), [kit.vendor.public])
        return verify(sealed, sealed.unlock(model_key(flex, kit.vendor)) if with_key else None)


def damage(kit: Kit, flex: Path, offsets: list[int]) -> None:
    data = bytearray(kit.data)
    for offset in offsets:
        data[offset] ^= 1
    flex.write_bytes(data)


def test_everything_is_counted(small: Kit) -> None:
    plan = small.manifest.plan
    for with_key in (True, False):
        report = report_of(small, small.flex, with_key=with_key)
        assert report == Report(plan.segment_count, plan.file_bytes - plan.data_offset, with_key, ())


def test_all_bad_segments_are_named_with_the_tensors_that_need_them(small: Kit, flex: Path) -> None:
    _, embed, body = small.manifest.plan.regions
    damage(small, flex, [embed.file_offset + 2 * embed.unit_bytes, body.file_offset + body.unit_bytes])
    report = report_of(small, flex)
    assert [(b.segment.index, b.segment.kind, b.problem) for b in report.bad] == [
        (embed.first_segment + 2, RegionKind.EMBED, "hash"),
        (body.first_segment + 1, RegionKind.BODY, "hash"),
    ]
    assert report.bad[0].tensors == ("token_embd.weight",)
    assert "output.weight" in report.bad[1].tensors
    assert "blk.0.attn_q.weight" not in report.bad[1].tensors
    assert "token_embd.weight" not in report.bad[1].tensors


def test_without_a_key_or_a_readable_header_no_tensor_is_named(small: Kit, flex: Path) -> None:
    meta, _, body = small.manifest.plan.regions
    damage(small, flex, [body.file_offset])
    assert [b.tensors for b in report_of(small, flex, with_key=False).bad] == [()]
    damage(small, flex, [meta.file_offset, body.file_offset])
    assert [(b.segment.kind, b.tensors) for b in report_of(small, flex).bad] == [
        (RegionKind.META, ()),
        (RegionKind.BODY, ()),
    ]


def test_a_segment_that_cannot_be_read_is_bad_and_the_others_are_still_checked(
    small: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    broken = small.manifest.plan.regions[1].file_offset

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == broken:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    assert [(b.segment.index, b.problem) for b in report_of(small, small.flex).bad] == [(1, "unreadable")]


def test_wrong_tags_under_right_hashes_are_found_with_the_key(kit: Kit, flex: Path) -> None:
    """Only a vendor can make such a file: its table has hashes of segments that its tags do not fit."""
    from ..sealed_fixtures import put, resign

    table = 616 + 16 * len(kit.manifest.tensors)
    flex.write_bytes(resign(kit.data, kit.vendor, put(table + 48, "16s", bytes(16))))
    assert [(b.segment.index, b.problem) for b in report_of(kit, flex).bad] == [(1, "tag")]
    assert report_of(kit, flex, with_key=False).authentic


def test_bytes_hidden_in_the_padding_after_the_header_are_refused(kit: Kit, flex: Path) -> None:
    from flexserve.sealed.crypto import SegmentCipher

    from ..sealed_fixtures import resign

    m = kit.manifest
    meta = m.region(RegionKind.META)
    key = model_key(kit.flex, kit.vendor)
    cipher = SegmentCipher(key, m.sealing_id, encode_name(m.model_id), m.model_version)
    with kit.flex.open("rb") as file:
        plain = SealedModel.open(file.fileno(), [kit.vendor.public]).unlock(key).gguf_header()
    hidden = plain.ljust(meta.padded_bytes - 6, b"\0") + b"hidden"
    assert meta.length < len(hidden) == meta.padded_bytes
    sealed = bytearray(len(hidden) + 16)
    cipher.encrypt_into(RegionKind.META, 0, hidden, len(hidden), sealed)
    import hashlib

    entry = bytes(sealed[-16:]) + hashlib.sha256(sealed[:-16]).digest()
    table = 616 + 16 * len(m.tensors)

    def change(manifest: bytearray) -> None:
        manifest[table : table + 48] = entry

    data = bytearray(resign(kit.data, kit.vendor, change))
    data[meta.file_offset : meta.file_offset + len(hidden)] = sealed[:-16]
    flex.write_bytes(data)
    with pytest.raises(ModelMalformed, match="followed by bytes"):
        report_of(kit, flex)


def test_progress_ends_with_everything_done(small: Kit) -> None:
    seen: list[tuple[int, int]] = []
    with small.flex.open("rb") as file:
        sealed = SealedModel.open(file.fileno(), [small.vendor.public])
        report = verify(sealed, progress=lambda *at: seen.append(at))
    assert seen[-1] == (report.checked_bytes, report.checked_bytes)


def test_an_interrupt_ends_it(small: Kit) -> None:
    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with small.flex.open("rb") as file, pytest.raises(KeyboardInterrupt):
        verify(SealedModel.open(file.fileno(), [small.vendor.public]), progress=interrupt)


def test_the_vendors_copy_of_the_key_is_bound_to_its_manifest(kit: Kit) -> None:
    from cryptography.exceptions import InvalidTag

    m = kit.manifest
    for info in (
        vendor_wrap_info("another", m.model_version, m.sealing_id, m.key_commitment),
        vendor_wrap_info(m.model_id, 2, m.sealing_id, m.key_commitment),
        vendor_wrap_info(m.model_id, m.model_version, bytes(16), m.key_commitment),
        vendor_wrap_info(m.model_id, m.model_version, m.sealing_id, bytes(32)),
    ):
        with pytest.raises(InvalidTag):
            kit.vendor.unwrap(m.vendor_wrap, info)


def test_errors_of_sealed_files_have_codes_of_their_own() -> None:
    from flexserve import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, FlexServeError)]
    codes = [c.code for c in classes]
    assert len(codes) == len(set(codes))
