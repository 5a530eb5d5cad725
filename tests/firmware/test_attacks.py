"""The firmware on an emulated Arm machine, under attack. Slow: about a hundred boots."""

from __future__ import annotations

import pytest

from flexserve.errors import EngineFailure
from flexserve.worlds.trustzone import attacks, firmware
from flexserve.worlds.trustzone.attacks import Row
from flexserve.worlds.trustzone.machine import Machine

MISSING = firmware.missing_tools()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"missing {', '.join(MISSING)}: {firmware.INSTALL}"),
]


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {row.attack.id: row for row in attacks.run(attacks.attacks())}


@pytest.mark.parametrize("name", [attack.id for attack in attacks.attacks()])
def test_the_attack_is_blocked_and_its_control_succeeds(rows: dict[str, Row], name: str) -> None:
    row = rows[name]
    assert row.blocked, row.with_defence
    assert row.control_succeeded, row.without_defence


def test_a_release_build_has_no_switch() -> None:
    built = firmware.build()
    assert firmware.MARKER not in built.flash
    with pytest.raises(EngineFailure, match="no defence to switch off"):
        built.without(frozenset({"UNMAP"}))


def test_the_secure_world_says_what_it_verified_and_nothing_else() -> None:
    with Machine(firmware.build().flash) as machine:
        machine.wait_for(attacks.READY, attacks.BOOT_S)
        assert machine.secure() == "el3: images verified\n"
