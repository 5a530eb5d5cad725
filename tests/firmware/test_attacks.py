"""The firmware on an emulated Arm machine, under attack. Slow: about a hundred boots."""

from __future__ import annotations

import pytest

from flexserve.errors import EngineFailure, NotFound
from flexserve.worlds.trustzone import attacks, firmware, linux
from flexserve.worlds.trustzone.attacks import Row
from flexserve.worlds.trustzone.machine import Ended, Machine


def no_linux() -> str:
    try:
        linux.find()
    except NotFound as error:
        return f"{error.message}: {error.hint}"
    return ""


NO_LINUX = no_linux()
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
    if NO_LINUX and name.startswith("linux-"):
        pytest.skip(NO_LINUX)
    row = rows[name]
    assert row.blocked, row.with_defence
    assert row.control_succeeded, row.without_defence


def test_debians_kernel_boots_on_two_cpus_sees_no_hidden_memory_and_powers_off() -> None:
    if NO_LINUX:
        pytest.skip(NO_LINUX)
    with linux.boot(linux.find(), "/bin/busybox cat /proc/iomem") as machine:
        assert "2 cpus" in machine.wait_for(linux.GREETING, attacks.BOOT_S)
        machine.wait_for("40000000-7ebfffff : System RAM", attacks.ATTACK_S)
        with pytest.raises(Ended):
            machine.wait_for("no such line", attacks.ATTACK_S)


@pytest.mark.parametrize(
    ("name", "times"), [("preempt-storm", 40), ("psci-storm", 3), ("race-access", 5), ("request-words", 3)]
)
def test_what_depends_on_chance_holds_again_and_again(name: str, times: int) -> None:
    assert [seen for seen in attacks.repeat(name, times) if seen.achieved is not False] == []


def test_a_release_build_has_no_switch() -> None:
    built = firmware.build()
    assert firmware.MARKER not in built.flash
    with pytest.raises(EngineFailure, match="no defence to switch off"):
        built.without(frozenset({"UNMAP"}))


def test_the_secure_world_says_what_it_verified_and_nothing_else() -> None:
    with Machine(firmware.build().flash) as machine:
        machine.wait_for(attacks.READY, attacks.BOOT_S)
        assert machine.secure() == "el3: images verified\n"
