"""Attack: the owner sets the clock back, or goes back to an older licence or model. Rule: the device state
remembers the highest time, version and serial, and only this device can write it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexserve.errors import LicenceExpired, LicenceWrongModel, RolledBack, StateNotAuthentic
from flexserve.sealed.keys import DeviceKey
from flexserve.sealed.seal import seal

from ..sealed_fixtures import DAY, NOW, Kit, full_check, license_for


@pytest.fixture
def today(kit: Kit) -> bytes:
    """A licence until the end of now."""
    return license_for(kit.flex, kit.vendor, kit.device, serial=7, expires_at=NOW)


def use(kit: Kit, licence: bytes, state: bytes | None, now: int, flex: Path | None = None) -> bytes:
    return full_check(flex or kit.flex, licence, kit.device, [kit.vendor.public], state=state, now=now)[1]


def test_an_expired_licence_is_refused_one_second_later(kit: Kit, today: bytes) -> None:
    use(kit, today, None, NOW)
    with pytest.raises(LicenceExpired, match="valid until 2027-01-15T08:00:00Z; it is 2027-01-15T08:00:01Z"):
        use(kit, today, None, NOW + 1)


def test_setting_the_clock_back_does_not_bring_a_licence_back(kit: Kit, today: bytes) -> None:
    state = use(kit, kit.licence, None, NOW + DAY)  # a licence without end moves the highest time
    for now in (NOW, NOW - DAY, 0, -5):
        with pytest.raises(LicenceExpired, match="the latest time this device has seen"):
            use(kit, today, state, now)


def test_a_refused_licence_records_nothing(kit: Kit, today: bytes) -> None:
    state = use(kit, today, None, NOW)
    with pytest.raises(LicenceExpired):
        use(kit, today, state, NOW + DAY)
    assert use(kit, today, state, NOW) == state


def test_an_older_licence_for_the_same_file_is_refused(kit: Kit, today: bytes) -> None:
    state = use(kit, today, None, NOW)
    with pytest.raises(RolledBack, match="serial 6; this device has already used serial 7"):
        use(kit, license_for(kit.flex, kit.vendor, kit.device, serial=6), state, NOW)


def test_an_older_version_of_the_model_is_refused(kit: Kit, flex: Path) -> None:
    seal(kit.gguf, flex, kit.vendor, version=2)
    newer = license_for(flex, kit.vendor, kit.device)
    state = use(kit, newer, use(kit, kit.licence, None, NOW), NOW, flex)
    with pytest.raises(RolledBack, match="version 1; this device has already used version 2"):
        use(kit, kit.licence, state, NOW)
    with pytest.raises(LicenceWrongModel):
        use(kit, kit.licence, state, NOW, flex)


def test_a_state_file_that_was_changed_or_made_elsewhere_is_refused(kit: Kit) -> None:
    state = use(kit, kit.licence, None, NOW)
    for at in range(len(state)):
        with pytest.raises(StateNotAuthentic):
            use(kit, kit.licence, state[:at] + bytes([state[at] ^ 1]) + state[at + 1 :], NOW)
    for bad in (b"", b"x", state[:-1], state + b"\0", bytes(len(state)), bytes(1 << 20)):
        with pytest.raises(StateNotAuthentic):
            use(kit, kit.licence, bad, NOW)
    other = DeviceKey.generate()
    licence = license_for(kit.flex, kit.vendor, other)
    with pytest.raises(StateNotAuthentic):
        full_check(kit.flex, licence, other, [kit.vendor.public], state=state)
