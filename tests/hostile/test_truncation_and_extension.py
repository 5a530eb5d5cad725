"""Attack: cut the file off, or add to it. Rule: its size is signed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexserve.errors import LicenceMalformed, SealedMalformed, SealedTruncated, SegmentNotAuthentic
from flexserve.sealed.licence import open_licence
from flexserve.sealed.reader import SealedModel
from flexserve.sealed.verify import verify

from ..sealed_fixtures import NOW, Kit, full_check, model_key


def test_every_other_length_is_refused(kit: Kit, flex: Path) -> None:
    data = kit.data
    size, offset = len(data), kit.manifest.plan.data_offset
    for length in (8, 100, 135, 136, 615, 616, 680, offset - 1, offset, offset + 4096, size - 4096, size - 1):
        flex.write_bytes(data[:length])
        with pytest.raises(SealedTruncated):
            full_check(flex, kit.licence, kit.device, [kit.vendor.public])
    for more in (b"\0", bytes(4096), data):
        flex.write_bytes(data + more)
        with pytest.raises(SealedTruncated):
            full_check(flex, kit.licence, kit.device, [kit.vendor.public])
    for length in range(8):
        flex.write_bytes(data[:length])
        with pytest.raises(SealedMalformed):
            full_check(flex, kit.licence, kit.device, [kit.vendor.public])


def test_every_other_length_of_a_licence_is_refused(kit: Kit) -> None:
    for data in (*(kit.licence[:n] for n in range(360)), kit.licence + b"\0", kit.licence * 2):
        with pytest.raises(LicenceMalformed):
            full_check(kit.flex, data, kit.device, [kit.vendor.public])


def test_a_file_cut_off_after_it_was_opened_is_reported_segment_by_segment(small: Kit, flex: Path) -> None:
    flex.write_bytes(small.data)
    with flex.open("r+b") as file:
        sealed = SealedModel.open(file.fileno(), [small.vendor.public])
        os.truncate(file.fileno(), sealed.segments[4].file_offset + 10)
        unlocked = sealed.unlock(model_key(small.flex, small.vendor))
        report = verify(sealed, unlocked)
        assert [(b.segment.index, b.problem) for b in report.bad] == [
            (i, "unreadable") for i in range(4, len(sealed.segments))
        ]
        os.truncate(file.fileno(), sealed.segments[0].file_offset)
        with pytest.raises(SealedTruncated):
            unlocked.gguf_header()


def test_a_directory_and_a_device_are_no_sealed_models(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/zero")):
        fd = os.open(path, os.O_RDONLY)
        try:
            with pytest.raises(SealedMalformed, match="not a regular file"):
                SealedModel.open(fd, [])
        finally:
            os.close(fd)


def test_content_replaced_after_the_manifest_was_read_is_not_used(small: Kit, flex: Path) -> None:
    flex.write_bytes(small.data)
    with flex.open("r+b") as file:
        sealed = SealedModel.open(file.fileno(), [small.vendor.public])
        key, _ = open_licence(small.licence, sealed, small.device, None, NOW)
        os.pwrite(file.fileno(), bytes(4096), sealed.segments[0].file_offset)
        with pytest.raises(SegmentNotAuthentic):
            sealed.unlock(key).gguf_header()
