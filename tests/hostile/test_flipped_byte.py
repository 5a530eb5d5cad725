"""Attack: change one byte of the sealed file or of the licence. Rule: every byte is signed, the signature
itself, a checked zero, or covered by a tag and a hash in the signed table."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from flexserve.errors import (
    FlexServeError,
    LicenceMalformed,
    LicenceNotAuthentic,
    ManifestNotAuthentic,
    SealedMalformed,
    SealedTruncated,
    SegmentNotAuthentic,
    VendorNotTrusted,
)

from ..sealed_fixtures import Kit, full_check

FLIPS = 1000


def refusal(kit: Kit, flex: Path, licence: bytes) -> FlexServeError | None:
    try:
        full_check(flex, licence, kit.device, [kit.vendor.public])
    except FlexServeError as error:
        return error
    return None


def flipped(data: bytes, at: int, bits: int) -> bytes:
    return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]


def test_unchanged_files_are_accepted(kit: Kit) -> None:
    assert refusal(kit, kit.flex, kit.licence) is None


def test_of_a_thousand_random_flips_none_is_accepted(kit: Kit, flex: Path) -> None:
    rng = random.Random(2)
    sealed, accepted = kit.data, []
    table = 616 + 16 * len(kit.manifest.tensors)
    areas = [(0, table), (table, kit.manifest.plan.data_offset), (0, len(sealed))]
    for number in range(FLIPS):
        bits = rng.randrange(1, 256)
        if number % 4 == 3:
            at = rng.randrange(len(kit.licence))
            error = refusal(kit, kit.flex, flipped(kit.licence, at, bits))
        else:
            at = rng.randrange(*areas[number % 4])
            flex.write_bytes(flipped(sealed, at, bits))
            error = refusal(kit, flex, kit.licence)
        if error is None:
            accepted.append((number, at, bits))
    assert not accepted


def test_every_bit_of_a_licence_counts(kit: Kit) -> None:
    for at in range(len(kit.licence)):
        for bit in range(8):
            error = refusal(kit, kit.flex, flipped(kit.licence, at, 1 << bit))
            assert isinstance(error, LicenceMalformed | LicenceNotAuthentic), (at, bit, error)


HEAD = [
    (0, SealedMalformed),  # magic
    (8, SealedMalformed),  # format version
    (12, SealedMalformed),  # reserved
    (16, ManifestNotAuthentic),  # manifest_bytes, on the same page
    (18, SealedMalformed),  # manifest_bytes, on another
    (24, SealedMalformed),  # data_offset
    (32, SealedTruncated),  # file_bytes
    (40, SealedMalformed),  # vendor_key_id
    (72, SealedMalformed),  # vendor_key
    (136, ManifestNotAuthentic),  # model_id
    (200, ManifestNotAuthentic),  # model_version
    (208, ManifestNotAuthentic),  # sealing_id
    (224, ManifestNotAuthentic),  # sealed_at
    (312, ManifestNotAuthentic),  # parameters
    (328, ManifestNotAuthentic),  # flags
    (344, ManifestNotAuthentic),  # key_commitment
    (376, ManifestNotAuthentic),  # vendor_wrap
    (489, ManifestNotAuthentic),  # reserved
    (496, ManifestNotAuthentic),  # regions
    (616, ManifestNotAuthentic),  # tensor map
]


@pytest.mark.parametrize(("at", "error"), HEAD)
def test_each_field_of_the_head_has_its_own_refusal(
    kit: Kit, flex: Path, at: int, error: type[FlexServeError]
) -> None:
    flex.write_bytes(flipped(kit.data, at, 1))
    found = refusal(kit, flex, kit.licence)
    assert type(found) is error, found


def test_signature_padding_and_data_have_their_own_refusals(kit: Kit, flex: Path) -> None:
    data = kit.data
    (manifest_bytes,) = struct.unpack_from("<Q", data, 16)
    offset = kit.manifest.plan.data_offset
    for at, error in (
        (manifest_bytes - 1, ManifestNotAuthentic),
        (manifest_bytes, ManifestNotAuthentic),
        (manifest_bytes + 63, ManifestNotAuthentic),
        (manifest_bytes + 64, SealedMalformed),
        (offset - 1, SealedMalformed),
        (offset, SegmentNotAuthentic),
        (len(data) - 1, SegmentNotAuthentic),
    ):
        flex.write_bytes(flipped(data, at, 0x80))
        found = refusal(kit, flex, kit.licence)
        assert type(found) is error, (at, found)


def test_another_vendors_key_in_the_head_is_a_stranger(kit: Kit, flex: Path) -> None:
    from flexserve.sealed.keys import VendorKey

    other = VendorKey.generate().public
    flex.write_bytes(kit.data[:40] + other.key_id + other.point + kit.data[136:])
    assert type(refusal(kit, flex, kit.licence)) is VendorNotTrusted
