"""Attack: swap, repeat or replay segments, or take one from another model or version. Rule: a segment's tag
stands in the signed table at its index, and nonce and associated data bind index, model and version."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flexserve.errors import SegmentNotAuthentic
from flexserve.sealed.crypto import SegmentCipher
from flexserve.sealed.format import Manifest, encode_name
from flexserve.sealed.gguf import read_header
from flexserve.sealed.reader import SealedModel
from flexserve.sealed.seal import content_of, seal, write_sealed

from ..sealed_fixtures import Kit, full_check, model_key

Move = Callable[[bytearray, Callable[[int], slice]], None]


def swap(data: bytearray, at: Callable[[int], slice]) -> None:
    data[at(2)], data[at(3)] = data[at(3)], data[at(2)]


def repeat(data: bytearray, at: Callable[[int], slice]) -> None:
    data[at(3)] = data[at(2)]


def rotate(data: bytearray, at: Callable[[int], slice]) -> None:
    data[at(2)], data[at(3)], data[at(4)] = data[at(4)], data[at(2)], data[at(3)]


def zero(data: bytearray, at: Callable[[int], slice]) -> None:
    data[at(3)] = bytes(len(data[at(3)]))


def places(flex: Path, kit: Kit) -> Callable[[int], slice]:
    with flex.open("rb") as file:
        segments = SealedModel.open(file.fileno(), [kit.vendor.public]).segments

    def at(index: int) -> slice:
        return slice(segments[index].file_offset, segments[index].file_offset + segments[index].length)

    return at


@pytest.mark.parametrize(("move", "bad"), [(swap, [2, 3]), (repeat, [3]), (rotate, [2, 3, 4]), (zero, [3])])
def test_a_segment_in_another_place_is_refused_by_tag_and_by_hash(
    small: Kit, flex: Path, move: Move, bad: list[int]
) -> None:
    data = bytearray(small.data)
    move(data, places(small.flex, small))
    flex.write_bytes(data)
    with pytest.raises(SegmentNotAuthentic, match=str(bad).replace("[", r"\[")):
        full_check(flex, small.licence, small.device, [small.vendor.public])
    assert tags_refused(flex, small) == bad


def tags_refused(flex: Path, kit: Kit) -> list[int]:
    """What a start refuses: it checks tags, not hashes."""
    bad = []
    with flex.open("rb") as file:
        model = SealedModel.open(file.fileno(), [kit.vendor.public]).unlock(model_key(flex, kit.vendor))
        for segment in model.segments:
            file.seek(segment.file_offset)
            ciphertext = bytearray(file.read(segment.length) + bytes(16))
            try:
                model.decrypt_into(
                    segment.index, memoryview(ciphertext), memoryview(bytearray(segment.length))
                )
            except SegmentNotAuthentic:
                bad.append(segment.index)
    return bad


def seal_with_key(kit: Kit, out: Path, key: bytes, model_id: str, version: int) -> Manifest:
    """A second sealing under the *same* model key, which no vendor's tool makes: the worst case."""
    meta, header = read_header(kit.gguf)
    out.touch()
    with kit.gguf.open("rb") as source, out.open("r+b") as target:
        return write_sealed(
            source.fileno(),
            target.fileno(),
            content_of(meta, header),
            kit.vendor,
            model_id=model_id,
            version=version,
            model_key=key,
        )


@pytest.mark.parametrize(
    ("model_id", "version"),
    [("another-model", 1), ("tiny-with-random-weights", 2), ("tiny-with-random-weights", 1)],
)
def test_a_segment_of_another_model_version_or_sealing_is_refused(
    kit: Kit, flex: Path, tmp_path: Path, model_id: str, version: int
) -> None:
    other = tmp_path / "other.flex"
    seal_with_key(kit, other, model_key(kit.flex, kit.vendor), model_id, version)
    at, theirs = places(kit.flex, kit), other.read_bytes()
    data = bytearray(kit.data)
    data[at(1)] = theirs[at(1)]
    flex.write_bytes(data)
    assert tags_refused(flex, kit) == [1]
    with pytest.raises(SegmentNotAuthentic, match=r"\[1\]"):
        full_check(flex, kit.licence, kit.device, [kit.vendor.public])


def test_an_old_sealing_of_the_same_file_cannot_be_replayed_into_a_new_one(
    kit: Kit, flex: Path, tmp_path: Path
) -> None:
    newer = tmp_path / "newer.flex"
    seal(kit.gguf, newer, kit.vendor, version=2)
    at = places(newer, kit)
    data = bytearray(newer.read_bytes())
    data[at(2)] = kit.data[at(2)]
    flex.write_bytes(data)
    assert tags_refused(flex, kit) == [2]


def test_the_cipher_alone_binds_model_version_region_index_and_length(kit: Kit) -> None:
    from cryptography.exceptions import InvalidTag

    right = SegmentCipher(b"k" * 32, b"s" * 16, encode_name("m"), 1)
    sealed, out = bytearray(4096 + 16), bytearray(4096)
    right.encrypt_into(3, 7, bytes(4096), 4096, sealed)
    right.decrypt_into(3, 7, sealed, 4096, out)
    for cipher, kind, index, length in (
        (SegmentCipher(b"k" * 32, b"s" * 16, encode_name("n"), 1), 3, 7, 4096),
        (SegmentCipher(b"k" * 32, b"s" * 16, encode_name("m"), 2), 3, 7, 4096),
        (SegmentCipher(b"k" * 32, b"t" * 16, encode_name("m"), 1), 3, 7, 4096),
        (SegmentCipher(b"l" * 32, b"s" * 16, encode_name("m"), 1), 3, 7, 4096),
        (right, 2, 7, 4096),
        (right, 3, 8, 4096),
        (right, 3, 7, 8192),
    ):
        with pytest.raises(InvalidTag):
            cipher.decrypt_into(kind, index, sealed, length, out)
