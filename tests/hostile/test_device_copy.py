"""A device copy that somebody changed, moved or kept is never believed, and the model still answers without it.

Rule: the MAC under this device's key covers every byte of the manifest; the tags in it cover the data; and the
manifest names device, sealing, licence, engine and processor (docs/sealed-format.md, "Device copy").
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexserve.errors import DeviceCopyRefused, SegmentNotAuthentic
from flexserve.sealed.copying import CopyWriter
from flexserve.sealed.device_copy import (
    COPY_ID_BYTES,
    HEAD_BYTES,
    CopyManifest,
    CopyTensor,
    DeviceCopy,
    Engine,
    copy_cipher,
    encode,
    open_copy,
    plan_copy,
)
from flexserve.sealed.format import RegionKind
from flexserve.sealed.keys import DeviceKey
from flexserve.sealed.reader import SealedModel, pread_exact

from ..sealed_fixtures import Kit, make_kit, model_key

HERE = Engine("engine-1", "x86_64 AVX2", bytes(32))
SERIAL = 5


@dataclass(frozen=True)
class Copy:
    """A device's copy of a kit's model. Its content does not matter here: plain zeros, but truly encrypted."""

    kit: Kit
    sealed: SealedModel
    key: bytes
    path: Path

    def open(
        self,
        data: bytes | None = None,
        *,
        device: DeviceKey | None = None,
        serial: int = SERIAL,
        engine: Engine = HERE,
        other: Copy | None = None,
    ) -> DeviceCopy:
        """As a start does, with these bytes in the file; as another device, or with another model's licence."""
        if data is not None:
            self.path.with_suffix(".changed").write_bytes(data)
        path = self.path if data is None else self.path.with_suffix(".changed")
        model = other or self
        with path.open("rb") as file:
            return open_copy(
                file.fileno(),
                model.sealed,
                model.key,
                serial=serial,
                device=device or self.kit.device,
                engine=engine,
            )

    @property
    def data(self) -> bytes:
        return self.path.read_bytes()

    def refused(self, reason: str, data: bytes | None = None, **how: object) -> None:
        with pytest.raises(DeviceCopyRefused, match=reason):
            self.open(data, **how)  # type: ignore[arg-type]

    def write(self, change: Callable[[CopyManifest], CopyManifest] = lambda m: m) -> bytes:
        """The device itself writes a copy, after a change of its manifest: rules hold for it too."""
        m = self.sealed.manifest
        tensors = tuple(CopyTensor(e.image_offset, e.length, i, i > 0) for i, e in enumerate(m.tensors))
        first = min(range(len(tensors)), key=lambda i: tensors[i].image_offset)
        tensors = tuple(t._replace(repacked=i != first) for i, t in enumerate(tensors))
        plan = plan_copy(m.region(RegionKind.EMBED).length, m.region(RegionKind.BODY).length, len(tensors))
        copy_id = os.urandom(COPY_ID_BYTES)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        cipher = copy_cipher(self.kit.device, self.key, copy_id, self.sealed)
        writer = CopyWriter(fd, plan, cipher, lambda _done, _total: None)
        for region in plan.regions[1:]:
            with writer.region(region):
                writer.zeros(region.length)
        writer.close()
        manifest = CopyManifest(
            *(self.kit.device.key_id, self.sealed.digest, SERIAL, copy_id, 1, HERE, plan, tensors),
            tags=bytes(writer.tags),
        )
        os.pwrite(fd, encode(change(manifest), self.kit.device), 0)
        os.close(fd)
        return self.data


def _copy(directory: Path) -> Copy:
    kit = make_kit(directory)
    sealed = SealedModel.open(os.open(kit.flex, os.O_RDONLY), [kit.vendor.public])
    copy = Copy(kit, sealed, model_key(kit.flex, kit.vendor), directory / "m.flexcopy")
    copy.write()
    return copy


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return _copy(tmp_path_factory.mktemp("copy"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """Another model of another vendor, on another device."""
    return _copy(tmp_path_factory.mktemp("stranger"))


def read_all(copy: Copy, opened: DeviceCopy, data: bytes) -> None:
    """Decrypt every segment. Raises `SegmentNotAuthentic`."""
    copy.path.with_suffix(".changed").write_bytes(data)
    with copy.path.with_suffix(".changed").open("rb") as file:
        for segment in opened.segments:
            cipher = memoryview(bytearray(segment.length + 16))
            pread_exact(file.fileno(), cipher[: segment.length], segment.file_offset)
            opened.decrypt_into(segment.index, cipher, memoryview(bytearray(segment.length)))


def test_the_copy_itself_is_believed(copy: Copy) -> None:
    """The control."""
    read_all(copy, copy.open(), copy.data)


@settings(max_examples=150, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_before_the_data_is_refused(copy: Copy, where: float, bit: int) -> None:
    data = bytearray(copy.data)
    (data_offset,) = struct.unpack_from("<Q", data, 24)
    data[int(where * data_offset)] ^= 1 << bit
    copy.refused("the device copy", bytes(data))


def test_a_flipped_bit_in_any_segment_is_found_when_it_is_used(copy: Copy) -> None:
    opened = copy.open()
    for segment in opened.segments:
        data = bytearray(copy.data)
        data[segment.file_offset + segment.length // 2] ^= 4
        with pytest.raises(SegmentNotAuthentic, match=f"segment {segment.index} "):
            read_all(copy, opened, bytes(data))


def test_two_segments_that_change_places_are_found(copy: Copy) -> None:
    opened, data = copy.open(), bytearray(copy.data)
    one, two = [s for s in opened.segments if s.kind is RegionKind.EMBED][:2]
    a, b = (
        slice(one.file_offset, one.file_offset + two.length),
        slice(two.file_offset, two.file_offset + two.length),
    )
    data[a], data[b] = data[b], data[a]
    with pytest.raises(SegmentNotAuthentic):
        read_all(copy, opened, bytes(data))


def test_segments_of_an_earlier_copy_do_not_fit_the_next_one(copy: Copy) -> None:
    """Each copy has a fresh key, and the key is the device's and the model's alone."""
    before = copy.data
    after = copy.write()
    opened = copy.open()
    at = opened.segments[0].file_offset
    with pytest.raises(SegmentNotAuthentic):
        read_all(copy, opened, after[:at] + before[at:])


@pytest.mark.parametrize("keep", [0, 7, 8, 100, HEAD_BYTES - 1, HEAD_BYTES, 4096, -4096, -1])
def test_a_truncated_copy_is_refused(copy: Copy, keep: int) -> None:
    copy.refused("the device copy", copy.data[:keep])


def test_a_longer_copy_is_refused(copy: Copy) -> None:
    copy.refused("says it has", copy.data + b"\0")


def test_the_copy_of_another_device_is_refused(copy: Copy) -> None:
    copy.refused("made by another device", device=DeviceKey.generate())


def test_a_copy_that_claims_to_be_this_devices_is_refused_without_its_key(copy: Copy) -> None:
    thief = DeviceKey.generate()
    copy.refused("not what this device wrote", copy.data[:40] + thief.key_id + copy.data[72:], device=thief)


def test_the_copy_of_another_model_is_refused(copy: Copy, stranger: Copy) -> None:
    copy.refused("another model", other=stranger)


def test_a_copy_made_under_an_older_or_newer_licence_is_refused(copy: Copy) -> None:
    copy.refused("another licence", serial=SERIAL + 1)
    copy.refused("another licence", serial=SERIAL - 1)


def test_a_copy_for_another_engine_or_processor_is_refused(copy: Copy) -> None:
    copy.refused("another engine", engine=replace(HERE, engine="engine-2"))
    copy.refused("another processor", engine=replace(HERE, cpu="x86_64"))
    copy.refused("another processor", engine=replace(HERE, layout_digest=b"1" * 32))


def test_a_sealed_model_or_a_directory_is_no_copy(copy: Copy, tmp_path: Path) -> None:
    copy.refused("does not begin with FLEXCOPY", copy.kit.data)
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(DeviceCopyRefused, match="not a regular file"):
        open_copy(fd, copy.sealed, copy.key, serial=SERIAL, device=copy.kit.device, engine=HERE)
    os.close(fd)


def _tensor(index: int, **fields: object) -> Callable[[CopyManifest], CopyManifest]:
    def change(m: CopyManifest) -> CopyManifest:
        tensors = list(m.tensors)
        tensors[index] = tensors[index]._replace(**fields)  # type: ignore[arg-type]
        return replace(m, tensors=tuple(tensors))

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_tensor(1, image_offset=1 << 41), "outside its region"),
        (_tensor(1, image_offset=33), "not aligned"),
        (_tensor(1, length=0), "empty"),
        (_tensor(1, source=0), "other tensors"),
        (_tensor(1, source=1 << 20), "other tensors"),
        (_tensor(0, repacked=True), "another embedding"),
        (lambda m: replace(m, licence_serial=0), "impossible serial"),
        (lambda m: replace(m, made_for=replace(HERE, engine="\n")), "names no engine"),
    ],
)
def test_even_what_the_device_wrote_must_follow_the_rules(
    tmp_path: Path, change: Callable[[CopyManifest], CopyManifest], reason: str
) -> None:
    mine = _copy(tmp_path)
    mine.write(change)
    mine.refused(reason)
