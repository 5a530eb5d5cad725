"""Attack: whoever got the model key out of one licensed device makes a file for the others. Rule: a start
takes the tag from the signed manifest only; verify and import check the signed SHA-256 as well, because a
GCM tag is no hash to a holder of the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from flexserve.errors import LicenceNotAuthentic, ManifestNotAuthentic, SegmentNotAuthentic, VendorNotTrusted
from flexserve.sealed.crypto import SegmentCipher, derive
from flexserve.sealed.format import encode_name
from flexserve.sealed.keys import VendorKey
from flexserve.sealed.reader import SealedModel
from flexserve.sealed.verify import verify

from ..sealed_fixtures import Kit, full_check, license_for, model_key, put, resign

SEGMENT = 2


def cipher_of(kit: Kit, key: bytes) -> SegmentCipher:
    m = kit.manifest
    return SegmentCipher(key, m.sealing_id, encode_name(m.model_id), m.model_version)


def gf128_multiply(a: int, b: int) -> int:
    """GCM's field: bit 0 is the most significant one (NIST SP 800-38D, 6.3)."""
    product = 0
    for bit in range(127, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (0xE1 << 120 if b & 1 else 0)
    return product


def with_same_tag(ciphertext: bytearray, segment_key: bytes) -> None:
    """Change block 5 as we like and block 6 so that the tag stays: GHASH is linear to whoever knows H."""
    encryptor = Cipher(algorithms.AES(segment_key), modes.ECB()).encryptor()
    h = int.from_bytes(encryptor.update(bytes(16)), "big")
    change = int.from_bytes(b"evil weights !!!", "big")
    for block, delta in ((5, change), (6, gf128_multiply(change, h))):
        at = slice(16 * block, 16 * block + 16)
        ciphertext[at] = (int.from_bytes(ciphertext[at], "big") ^ delta).to_bytes(16, "big")


def test_a_segment_encrypted_again_with_the_key_has_another_tag_and_is_refused_at_start(
    kit: Kit, flex: Path
) -> None:
    key = model_key(kit.flex, kit.vendor)
    with kit.flex.open("rb") as file:
        model = SealedModel.open(file.fileno(), [kit.vendor.public]).unlock(key)
    segment = model.segments[SEGMENT]
    forged = bytearray(segment.length + 16)
    evil = b"evil" * (segment.length // 4)
    cipher_of(kit, key).encrypt_into(segment.kind, SEGMENT, evil, segment.length, forged)
    cipher_of(kit, key).decrypt_into(segment.kind, SEGMENT, forged, segment.length, bytearray(segment.length))
    out = bytearray(segment.length)
    with pytest.raises(SegmentNotAuthentic):
        model.decrypt_into(SEGMENT, memoryview(forged), memoryview(out))
    assert not any(out)
    flex.write_bytes(
        kit.data[: segment.file_offset] + forged[:-16] + kit.data[segment.file_offset + segment.length :]
    )
    with pytest.raises(SegmentNotAuthentic, match=r"\[2\]"):
        full_check(flex, kit.licence, kit.device, [kit.vendor.public])


def test_a_forgery_with_the_right_tag_passes_a_start_and_is_found_by_verify_with_and_without_key(
    kit: Kit, flex: Path
) -> None:
    key = model_key(kit.flex, kit.vendor)
    with kit.flex.open("rb") as file:
        segment = SealedModel.open(file.fileno(), [kit.vendor.public]).segments[SEGMENT]
    end = segment.file_offset + segment.length
    data = bytearray(kit.data)
    forged = data[segment.file_offset : end]
    with_same_tag(forged, derive(key, kit.manifest.sealing_id, b"flexserve/v1/segment-key"))
    data[segment.file_offset : end] = forged
    flex.write_bytes(data)
    with flex.open("rb") as file:
        sealed = SealedModel.open(file.fileno(), [kit.vendor.public])
        unlocked = sealed.unlock(key)
        # The control: the forgery is real. This is what the hashes are for (docs/sealed-format.md).
        unlocked.decrypt_into(SEGMENT, memoryview(forged + bytes(16)), memoryview(bytearray(segment.length)))
        for report in (verify(sealed, unlocked), verify(sealed)):
            assert [(b.segment.index, b.problem) for b in report.bad] == [(SEGMENT, "hash")]


def test_a_new_table_needs_a_new_signature_which_only_the_vendor_can_make(kit: Kit, flex: Path) -> None:
    data = bytearray(kit.data)
    data[616 + 16 * len(kit.manifest.tensors)] ^= 1
    flex.write_bytes(data)
    with pytest.raises(ManifestNotAuthentic):
        full_check(flex, kit.licence, kit.device, [kit.vendor.public])
    thief = VendorKey.generate()
    flex.write_bytes(resign(kit.data, thief, put(40, "32s64s", thief.public.key_id, thief.public.point)))
    with pytest.raises(VendorNotTrusted):
        full_check(flex, kit.licence, kit.device, [kit.vendor.public])


def test_a_licence_with_another_model_key_is_refused_although_the_vendor_signed_it(kit: Kit) -> None:
    """A mistake of the vendor's, or a key chosen so that one ciphertext has two plaintexts."""
    from dataclasses import replace

    from flexserve.sealed.licence import Licence

    licence = Licence.parse(license_for(kit.flex, kit.vendor, kit.device))
    wrong = replace(licence, wrapped_key=kit.device.public.wrap(b"x" * 32, licence.info))
    data = wrong.signed_bytes + kit.vendor.sign(wrong.signed_bytes)
    with pytest.raises(LicenceNotAuthentic, match="does not open"):
        full_check(kit.flex, data, kit.device, [kit.vendor.public])
