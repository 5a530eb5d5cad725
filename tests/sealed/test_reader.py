from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from flexserve.errors import LicenceNotAuthentic, SealedTruncated, SegmentNotAuthentic, StorageFailure
from flexserve.sealed.format import RegionKind
from flexserve.sealed.gguf import parse_header
from flexserve.sealed.reader import SealedModel, UnlockedModel, pread_exact, read_manifest

from ..sealed_fixtures import Kit, license_for, model_key


def unlocked(kit: Kit, fd: int) -> UnlockedModel:
    return SealedModel.open(fd, [kit.vendor.public]).unlock(model_key(kit.flex, kit.vendor))


def image_of(model: UnlockedModel) -> bytearray:
    """Every segment decrypted to its place, as the arena does it."""
    image = bytearray(model.manifest.plan.image_bytes)
    for segment in model.segments:
        if segment.kind is RegionKind.META:
            continue
        ciphertext = memoryview(bytearray(segment.length + 16))
        pread_exact(model.sealed.fd, ciphertext[: segment.length], segment.file_offset)
        place = memoryview(image)[segment.image_offset : segment.image_offset + segment.length]
        model.decrypt_into(segment.index, ciphertext, place)
    return image


def test_the_image_holds_every_tensor_at_its_mapped_place_and_zeros_elsewhere(small: Kit) -> None:
    gguf = small.gguf.read_bytes()
    header = parse_header(gguf, len(gguf))
    with small.flex.open("rb") as file:
        model = unlocked(small, file.fileno())
        image = image_of(model)
        assert model.gguf_header() == gguf[: header.data_offset]
    for tensor, (offset, length) in zip(header.tensors, model.manifest.tensors, strict=True):
        start = header.data_offset + tensor.offset
        assert image[offset : offset + length] == gguf[start : start + length], tensor.name
        image[offset : offset + length] = bytes(length)
    assert not any(image)


def test_segments_cover_the_data_without_gap_or_overlap(small: Kit) -> None:
    with small.flex.open("rb") as file:
        sealed = SealedModel.open(file.fileno(), [small.vendor.public])
    plan = sealed.manifest.plan
    end = plan.data_offset
    for index, segment in enumerate(sealed.segments):
        assert (segment.index, segment.file_offset) == (index, end)
        assert segment.file_offset % 4096 == segment.length % 4096 == 0
        end += segment.length
    assert end == plan.file_bytes == small.flex.stat().st_size
    assert sealed.segments[-1] == sealed.segments[len(sealed.segments) - 1]
    assert list(sealed.segments[1:3]) == [sealed.segments[1], sealed.segments[2]]
    with pytest.raises(IndexError):
        sealed.segments[len(sealed.segments)]


def test_a_refused_segment_leaves_zeros_in_the_output(kit: Kit) -> None:
    with kit.flex.open("rb") as file:
        model = unlocked(kit, file.fileno())
        segment = model.segments[1]
        ciphertext = memoryview(bytearray(segment.length + 16))
        pread_exact(file.fileno(), ciphertext[: segment.length], segment.file_offset)
        ciphertext[100] ^= 1
        out = bytearray(b"x" * segment.length)
        with pytest.raises(SegmentNotAuthentic, match="segment 1 "):
            model.decrypt_into(1, ciphertext, memoryview(out))
    assert not any(out)


def test_a_run_of_segments_is_decrypted_as_one_by_one_and_the_first_refused_one_leaves_zeros(
    small: Kit,
) -> None:
    with small.flex.open("rb") as file:
        model = unlocked(small, file.fileno())
        image = image_of(model)
        for kind in (RegionKind.EMBED, RegionKind.BODY):
            region = model.manifest.region(kind)
            sealed = memoryview(bytearray(region.padded_bytes + 16))
            pread_exact(file.fileno(), sealed[:-16], region.file_offset)
            out = bytearray(region.padded_bytes)
            run = (region.first_segment, region.segment_count)
            model.decrypt_run_into(*run, sealed, memoryview(out))
            assert out == image[region.image_offset : region.image_offset + region.padded_bytes]
            with pytest.raises(ValueError, match="wrong buffers"):
                model.decrypt_run_into(*run, sealed[1:], memoryview(out))
            pread_exact(file.fileno(), sealed[:-16], region.file_offset)  # tags were written into it
            sealed[region.unit_bytes + 7] ^= 1
            with pytest.raises(SegmentNotAuthentic, match=f"segment {region.first_segment + 1} "):
                model.decrypt_run_into(*run, sealed, memoryview(out))
            second = out[region.unit_bytes : 2 * region.unit_bytes]
            assert not any(second)


def test_buffers_of_another_size_are_refused_before_anything_is_written(kit: Kit) -> None:
    with kit.flex.open("rb") as file:
        model = unlocked(kit, file.fileno())
        length = model.segments[1].length
        for sizes in ((length, length), (length + 16, length - 1), (length + 17, length)):
            ciphertext, out = (bytearray(n) for n in sizes)
            with pytest.raises(ValueError, match="wrong buffers"):
                model.decrypt_into(1, memoryview(ciphertext), memoryview(out))
            assert not any(ciphertext)


def test_threads_may_decrypt_at_the_same_time(small: Kit) -> None:
    with small.flex.open("rb") as file:
        model = unlocked(small, file.fileno())
        want = hashlib.sha256(image_of(model)).digest()
        got: list[bytes] = []
        threads = [
            threading.Thread(target=lambda: got.append(hashlib.sha256(image_of(model)).digest()))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == [want] * 4


def test_a_key_the_manifest_does_not_commit_to_is_refused(kit: Kit) -> None:
    with kit.flex.open("rb") as file:
        sealed = SealedModel.open(file.fileno(), [kit.vendor.public])
        with pytest.raises(LicenceNotAuthentic, match="does not open"):
            sealed.unlock(bytes(32))


def test_two_sealings_of_one_model_share_no_byte_of_ciphertext_and_no_key(kit: Kit, flex: Path) -> None:
    from flexserve.sealed.seal import seal

    again = seal(kit.gguf, flex, kit.vendor)
    assert again.sealing_id != kit.manifest.sealing_id
    assert model_key(flex, kit.vendor) != model_key(kit.flex, kit.vendor)
    hashes = [{m.hash(i) for i in range(m.plan.segment_count)} for m in (again, kit.manifest)]
    assert not hashes[0] & hashes[1]


def test_the_file_shows_no_plaintext(kit: Kit) -> None:
    gguf, sealed = kit.gguf.read_bytes(), kit.data
    for needle in (b"tokenizer", b"token_embd", b"<|eot_id|>", b"header_id"):
        assert needle in gguf
        assert needle not in sealed
    header = parse_header(gguf, len(gguf))
    for tensor in header.tensors:
        start = header.data_offset + tensor.offset
        assert gguf[start : start + 32] not in sealed


def test_pread_exact_goes_through_short_reads(monkeypatch: pytest.MonkeyPatch, kit: Kit) -> None:
    real = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return real(fd, [buffers[0][:700]], offset)

    monkeypatch.setattr(os, "preadv", short)
    buffer = bytearray(5000)
    with kit.flex.open("rb") as file:
        pread_exact(file.fileno(), memoryview(buffer), 10)
    assert buffer == kit.data[10:5010]


def test_the_end_of_the_file_and_a_failing_read_are_different_errors(
    monkeypatch: pytest.MonkeyPatch, kit: Kit
) -> None:
    with kit.flex.open("rb") as file:
        with pytest.raises(SealedTruncated, match="became shorter"):
            pread_exact(file.fileno(), memoryview(bytearray(10)), kit.flex.stat().st_size - 5)

        def broken(*_: object) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(StorageFailure, match="Input/output error"):
            pread_exact(file.fileno(), memoryview(bytearray(10)), 0)


def test_read_manifest_needs_no_trust_and_names_the_vendor(kit: Kit) -> None:
    with kit.flex.open("rb") as file:
        signed = read_manifest(file.fileno())
    assert signed.vendor == kit.vendor.public
    assert signed.manifest == kit.manifest
    assert license_for(kit.flex, kit.vendor, kit.device)[88:120] == signed.digest
