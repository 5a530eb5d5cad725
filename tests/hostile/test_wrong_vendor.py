"""Attack: a model from somebody this device does not trust. Rule: only the trust store's keys count."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexserve.errors import ManifestNotAuthentic, VendorNotTrusted
from flexserve.sealed.keys import VendorKey
from flexserve.sealed.seal import seal

from ..sealed_fixtures import Kit, full_check, license_for, put, resign


def test_a_model_of_a_stranger_is_refused_however_well_it_is_signed(kit: Kit, flex: Path) -> None:
    stranger = VendorKey.generate()
    seal(kit.gguf, flex, stranger)
    licence = license_for(flex, stranger, kit.device)
    full_check(flex, licence, kit.device, [stranger.public])  # the control
    for trusted in ([], [kit.vendor.public]):
        with pytest.raises(VendorNotTrusted, match=stranger.public.key_id.hex()):
            full_check(flex, licence, kit.device, trusted)


def test_a_strangers_signature_under_a_trusted_name_is_refused(kit: Kit, flex: Path) -> None:
    flex.write_bytes(resign(kit.data, VendorKey.generate(), put(200, "Q", 2)))
    with pytest.raises(ManifestNotAuthentic):
        full_check(flex, kit.licence, kit.device, [kit.vendor.public])


def test_the_sealing_key_signs_nothing(kit: Kit, flex: Path) -> None:
    swapped = VendorKey(kit.vendor._sealing, kit.vendor._signing)
    flex.write_bytes(resign(kit.data, swapped, put(200, "Q", 2)))
    with pytest.raises(ManifestNotAuthentic):
        full_check(flex, kit.licence, kit.device, [kit.vendor.public])
