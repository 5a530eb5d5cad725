from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexserve.errors import KeyProblem, LicenceMalformed
from flexserve.sealed.format import MAX_INTEGER, MAX_TIME
from flexserve.sealed.keys import VendorKey
from flexserve.sealed.licence import NEVER, Licence, issue, utc
from flexserve.sealed.reader import SealedModel
from flexserve.sealed.state import DeviceState

from ..sealed_fixtures import DAY, NOW, Kit, full_check, license_for

digests = st.binary(min_size=32, max_size=32)
licences = st.builds(
    Licence,
    model_id=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    model_version=st.integers(1, MAX_INTEGER),
    manifest_digest=digests,
    device_key_id=digests,
    issued_at=st.integers(0, MAX_TIME),
    expires_at=st.one_of(st.just(NEVER), st.integers(0, MAX_TIME)),
    serial=st.integers(1, MAX_INTEGER),
    wrapped_key=st.binary(min_size=113, max_size=113),
    signature=st.binary(min_size=64, max_size=64),
)


@given(licences)
def test_a_licence_survives_its_bytes(licence: Licence) -> None:
    data = licence.encode()
    assert len(data) == 360
    assert Licence.parse(data) == licence


@given(licences, st.sampled_from(["model_version", "issued_at", "expires_at", "serial"]))
def test_numbers_outside_their_limits_do_not_parse(licence: Licence, field: str) -> None:
    too_much = {
        "model_version": MAX_INTEGER + 1,
        "issued_at": MAX_TIME + 1,
        "expires_at": NEVER - 1,
        "serial": 0,
    }
    with pytest.raises(LicenceMalformed):
        Licence.parse(replace(licence, **{field: too_much[field]}).encode())  # type: ignore[arg-type]


def test_a_licence_opens_its_model_until_the_end_of_its_last_second(kit: Kit) -> None:
    licence = license_for(kit.flex, kit.vendor, kit.device, expires_at=NOW)
    report, state = full_check(kit.flex, licence, kit.device, [kit.vendor.public], now=NOW)
    assert report.authentic
    assert DeviceState.decode(state, kit.device).highest_time == NOW


def test_a_later_licence_takes_over_and_the_same_one_may_be_used_again(kit: Kit) -> None:
    trusted = [kit.vendor.public]
    first = license_for(kit.flex, kit.vendor, kit.device, serial=5)
    second = license_for(kit.flex, kit.vendor, kit.device, serial=6, expires_at=NOW + DAY)
    _, state = full_check(kit.flex, first, kit.device, trusted)
    _, state = full_check(kit.flex, first, kit.device, trusted, state=state)
    _, state = full_check(kit.flex, second, kit.device, trusted, state=state)
    assert [e.serial for e in DeviceState.decode(state, kit.device).entries] == [6]


def test_a_vendor_without_the_sealing_key_cannot_license(kit: Kit) -> None:
    other = VendorKey.generate()
    half = VendorKey(kit.vendor._signing, other._sealing)
    with kit.flex.open("rb") as file:
        sealed = SealedModel.open(file.fileno(), [kit.vendor.public])
        with pytest.raises(KeyProblem, match="another sealing key"):
            issue(sealed, half, kit.device.public, issued_at=NOW, serial=1)


def test_a_licence_shows_no_model_key(kit: Kit, flex: Path) -> None:
    from ..sealed_fixtures import model_key

    assert model_key(kit.flex, kit.vendor) not in kit.licence + kit.data


def test_times_are_shown_in_utc() -> None:
    assert utc(0) == "1970-01-01T00:00:00Z"
    assert utc(MAX_TIME) == "9999-12-31T23:59:59Z"
    assert utc(NEVER) == "never"
