"""Attack: a licence that the vendor did not write for this device and this file. Rule: one signature over all
of it, checked first; the same fields are the HPKE info; the key must match the manifest's commitment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flexserve.errors import (
    FlexServeError,
    LicenceNotAuthentic,
    LicenceWrongDevice,
    LicenceWrongModel,
)
from flexserve.sealed.crypto import CURVE_ORDER
from flexserve.sealed.keys import DeviceKey, VendorKey
from flexserve.sealed.licence import NEVER, Licence
from flexserve.sealed.seal import seal

from ..sealed_fixtures import NOW, Kit, full_check, license_for, model_key


def check(kit: Kit, licence: bytes) -> None:
    full_check(kit.flex, licence, kit.device, [kit.vendor.public])


def signed_by(vendor: VendorKey, licence: Licence) -> bytes:
    return licence.signed_bytes + vendor.sign(licence.signed_bytes)


def test_a_licence_for_another_device_is_refused_and_says_for_which(kit: Kit) -> None:
    other = DeviceKey.generate()
    with pytest.raises(LicenceWrongDevice, match=other.key_id.hex()):
        check(kit, license_for(kit.flex, kit.vendor, other))


def test_another_device_cannot_use_this_ones_licence(kit: Kit) -> None:
    with pytest.raises(LicenceWrongDevice):
        full_check(kit.flex, kit.licence, DeviceKey.generate(), [kit.vendor.public])


def test_a_licence_signed_by_anybody_else_is_refused(kit: Kit) -> None:
    licence = Licence.parse(kit.licence)
    for forger in (VendorKey.generate(), VendorKey(kit.vendor._sealing, kit.vendor._signing)):
        with pytest.raises(LicenceNotAuthentic, match="is not signed by"):
            check(kit, signed_by(forger, licence))


def test_whoever_holds_the_model_key_still_cannot_write_a_licence(kit: Kit) -> None:
    licence = Licence.parse(kit.licence)
    forged = replace(licence, expires_at=NEVER, serial=licence.serial + 1)
    key = model_key(kit.flex, kit.vendor)
    forged = replace(forged, wrapped_key=kit.device.public.wrap(key, forged.info))
    with pytest.raises(LicenceNotAuthentic):
        check(kit, forged.encode())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda x: replace(x, model_id="another"), LicenceWrongModel),
        (lambda x: replace(x, model_version=2), LicenceWrongModel),
        (lambda x: replace(x, manifest_digest=bytes(32)), LicenceWrongModel),
        (lambda x: replace(x, device_key_id=bytes(32)), LicenceWrongDevice),
        (lambda x: replace(x, expires_at=NOW + 5), LicenceNotAuthentic),
        (lambda x: replace(x, issued_at=x.issued_at + 1), LicenceNotAuthentic),
        (lambda x: replace(x, serial=x.serial + 1), LicenceNotAuthentic),
        (lambda x: replace(x, wrapped_key=bytes(113)), LicenceNotAuthentic),
    ],
)
def test_each_field_is_bound_twice_by_the_signature_and_by_the_wrapped_key(
    kit: Kit, change: Callable[[Licence], Licence], error: type[FlexServeError]
) -> None:
    changed = change(Licence.parse(kit.licence))
    with pytest.raises(LicenceNotAuthentic, match="is not signed by"):
        check(kit, changed.encode())
    with pytest.raises(error):  # even if the vendor itself signed the changed field over the old wrapped key
        check(kit, signed_by(kit.vendor, changed))


def test_a_licence_for_another_sealing_of_the_same_model_and_version_is_refused(kit: Kit, flex: Path) -> None:
    seal(kit.gguf, flex, kit.vendor)
    with pytest.raises(LicenceWrongModel, match="another sealing"):
        check(kit, license_for(flex, kit.vendor, kit.device))


def test_the_second_form_of_a_signature_is_refused(kit: Kit) -> None:
    s = int.from_bytes(kit.licence[-32:], "big")
    with pytest.raises(LicenceNotAuthentic):
        check(kit, kit.licence[:-32] + (CURVE_ORDER - s).to_bytes(32, "big"))


def test_a_manifests_signature_signs_no_licence(kit: Kit) -> None:
    at = kit.manifest.plan.manifest_bytes
    with pytest.raises(LicenceNotAuthentic):
        check(kit, kit.licence[:-64] + kit.data[at : at + 64])
