"""Doctor's lines, each also where its measure is missing."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flexserve.sealed.keyfile import write_key
from flexserve.sealed.keys import DeviceKey, VendorKey
from flexserve.sealed.trust import TrustStore
from flexserve.worlds.linux import doctor, landlock, users
from flexserve.worlds.linux.channel import Measures
from flexserve.worlds.linux.doctor import Gateway, Line, Mode, State, examine, process_lines
from flexserve.worlds.linux.probe import FILES, Probe, _crash, probe

from ..attacker import needs_tracing

ALL_WAYS = {*FILES, "process_vm_readv", "ptrace"}
ME = frozenset({0, os.geteuid()})


@pytest.fixture(scope="module")
def seen() -> Probe:
    return probe()


def states(lines: list[Line]) -> dict[str, State]:
    return {line.id: line.state for line in lines}


# The secure process


def test_the_secure_process_lets_nobody_in(seen: Probe) -> None:
    assert seen.secure.reached == ()
    assert seen.secure.processes == seen.twin.processes == 3


@needs_tracing
def test_control_its_twin_without_hardening_lets_everybody_in(seen: Probe) -> None:
    assert set(seen.twin.reached) == ALL_WAYS


def test_everything_this_version_promises_holds_for_it(seen: Probe) -> None:
    found = states(process_lines(seen))
    here_or_not = {
        "landlock": landlock.version() > 0,
        "memfd_secret": seen.measures.secret_memory,
        "secure_user": users.may_change_user(),
    }
    assert {line for line, state in found.items() if state == State.WEAK} == {
        line for line, is_here in here_or_not.items() if not is_here
    }
    assert State.BROKEN not in found.values()


@needs_tracing
def test_without_hardening_the_lines_it_is_for_are_broken(seen: Probe) -> None:
    found = states(process_lines(replace(seen, secure=seen.twin, measures=Measures())))
    broken = {line_id for line_id, state in found.items() if state == State.BROKEN}
    expected = {"memory", "ptrace", "core", "no_new_privs", "seccomp"}
    expected |= {"landlock"} if landlock.version() else set()
    expected |= {"secure_user"} if users.may_change_user() else set()
    assert broken == expected


@pytest.mark.parametrize("way", sorted(ALL_WAYS))
def test_one_way_in_is_enough_to_break_the_line(seen: Probe, way: str) -> None:
    found = states(process_lines(replace(seen, secure=replace(seen.secure, reached=(way,)))))
    line_id = "ptrace" if way == "ptrace" else "memory"
    assert {i for i, state in found.items() if state == State.BROKEN} == {line_id}


def test_each_measure_that_is_missing_breaks_its_line(seen: Probe) -> None:
    for line_id, look in (
        ("core", replace(seen.secure, dumped_core=True)),
        ("descriptors", replace(seen.secure, inherited_descriptor_closed=False)),
        ("capabilities", replace(seen.secure, capabilities=True)),
        ("seccomp", replace(seen.secure, seccomp=False)),
        ("no_new_privs", replace(seen.secure, no_new_privs=False)),
        ("environment", replace(seen.secure, environment=("GGML_NO_BACKTRACE", "LD_PRELOAD"))),
    ):
        assert states(process_lines(replace(seen, secure=look)))[line_id] == State.BROKEN


@pytest.mark.parametrize("has_it", [True, False])
def test_landlock_is_used_where_the_kernel_has_it_and_doctor_says_where_not(
    seen: Probe, has_it: bool
) -> None:
    without = replace(seen, measures=Measures(file_refused=True))
    found = states(process_lines(without, kernel_has_landlock=has_it))["landlock"]
    assert found == (State.BROKEN if has_it else State.WEAK)
    used = replace(seen, measures=Measures(landlock=1, file_refused=True))
    assert states(process_lines(used))["landlock"] == State.OK


def test_keys_in_ordinary_memory_are_weak(seen: Probe) -> None:
    for is_secret, state in ((True, State.OK), (False, State.WEAK)):
        measures = Measures(file_refused=True, secret_memory=is_secret)
        assert states(process_lines(replace(seen, measures=measures)))["memfd_secret"] == state


def test_a_file_that_could_be_opened_breaks_the_line_of_the_filter(seen: Probe) -> None:
    for refused, state in ((True, State.OK), (False, State.BROKEN)):
        measures = Measures(file_refused=refused)
        assert states(process_lines(replace(seen, measures=measures)))["seccomp"] == state


def test_a_secure_process_that_is_the_gateways_user_is_weak_and_worse_when_root_started_it(
    seen: Probe,
) -> None:
    def state(starter: int, *who: int) -> State:
        look = replace(seen.secure, users=who)
        return states(process_lines(replace(seen, user=starter, secure=look)))["secure_user"]

    assert state(0, 61500) == State.OK
    assert state(1000, 1000) == State.WEAK
    not_dropped = State.BROKEN if users.may_change_user() else State.WEAK
    assert state(0, 0) == state(0, 0, 61500) == not_dropped


def test_where_the_machine_refuses_by_itself_doctor_does_not_take_the_credit(seen: Probe) -> None:
    (line,) = (x for x in process_lines(replace(seen, twin=seen.secure)) if x.id == "ptrace")
    assert "this machine refuses that without our doing" in line.found


def test_no_userfaultfd_is_weak_not_broken(seen: Probe) -> None:
    assert states(process_lines(replace(seen, flexmem="none: denied")))["userfaultfd"] == State.WEAK


def test_the_crash_check_notices_a_core(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard == 0:
        pytest.skip("this user may not have core files at all")
    code = f"import resource as r; r.setrlimit(r.RLIMIT_CORE, ({{}}, {hard})); print(flush=True); input()"
    for limit, dumped in ((0, False), (hard, True)):
        with subprocess.Popen(
            [sys.executable, "-c", code.format(limit)], stdin=-1, stdout=-1, cwd=tmp_path
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert _crash(process.pid) == dumped


def test_a_secure_process_that_does_not_start_is_a_broken_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (line,), _ = doctor._process_lines()
    assert (line.id, line.state) == ("secure_process", State.BROKEN)
    assert line.advice


# The installation and the user


def test_what_others_may_change_is_found_wherever_it_lies(tmp_path: Path) -> None:
    root = tmp_path / "app"
    (root / "deep").mkdir(parents=True)
    code = root / "deep" / "code.py"
    code.touch()
    root.chmod(0o755)
    assert doctor.install_line([root], ME).state == State.OK
    assert doctor.changeable([code], ME) is None
    code.chmod(0o666)
    line = doctor.install_line([root], ME)
    assert line.state == State.WEAK
    assert str(code) in line.found
    code.chmod(0o644)
    root.chmod(0o777)
    assert doctor.changeable([code], ME) == root, "who may rename a directory may replace what is in it"
    root.chmod(0o1777)
    assert doctor.changeable([code], ME) is None
    assert doctor.changeable([code], frozenset({4242})) is not None, "another owner"


def test_only_a_system_user_in_a_root_owned_install_is_service_mode(tmp_path: Path) -> None:
    defs = tmp_path / "login.defs"
    defs.write_text("# users\nSYS_UID_MAX\t\t499\n")
    of = {uid: doctor.user_line(uid, defs).state for uid in (0, 499, 500, 1000, 61184, 65534)}
    assert of == {
        0: State.WEAK, 499: State.OK, 500: State.WEAK, 1000: State.WEAK, 61184: State.OK, 65534: State.WEAK,
    }  # fmt: skip
    assert doctor.user_line(999, tmp_path / "absent").state == State.OK


def test_root_is_fine_where_the_gateway_becomes_another_user() -> None:
    assert doctor.user_line(0, gateway=Gateway("flexserve", None)).state == State.OK
    line = doctor.user_line(0, gateway=Gateway("flexserve", Path("/root")))
    assert line.state == State.WEAK
    assert "/root" in line.found


def test_the_mode_follows_from_both_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_process_lines", lambda: ([], False))
    line = Line("x", State.OK, "", "")
    for install, user, mode in (
        (State.OK, State.OK, Mode.SERVICE),
        (State.WEAK, State.OK, Mode.SINGLE_USER),
        (State.OK, State.WEAK, Mode.SINGLE_USER),
    ):
        monkeypatch.setattr(doctor, "install_line", lambda _, s=install: replace(line, state=s))
        monkeypatch.setattr(doctor, "user_line", lambda _, s=user, **__: replace(line, state=s))
        report = examine(None, TrustStore(tmp_path))
        assert report.mode == mode
        assert report.holds


# Swap


def machine(root: Path, swaps: str = "", cgroup: str = "0::/a/b\n") -> Path:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "swaps").write_text("Filename Type Size Used Priority\n" + swaps)
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    (root / "sys" / "fs" / "cgroup" / "a" / "b").mkdir(parents=True)
    for name in ("zram0", "zram1", "dm-0", "dm-1"):
        (root / "sys" / "class" / "block" / name / "dm").mkdir(parents=True)
    block = root / "sys" / "class" / "block"
    (block / "zram0" / "backing_dev").write_text("none\n")
    (block / "zram1" / "backing_dev").write_text("/dev/sda3\n")
    (block / "dm-0" / "dm" / "uuid").write_text("CRYPT-PLAIN-swap\n")
    (block / "dm-1" / "dm" / "uuid").write_text("LVM-swap\n")
    return root


@pytest.mark.parametrize(
    ("swaps", "state"),
    [
        ("", State.OK),
        ("/dev/sda2 partition 100 0 -2\n", State.WEAK),
        ("/swapfile file 100 0 -2\n", State.WEAK),
        ("/dev/zram0 partition 100 0 -2\n", State.OK),
        ("/dev/zram1 partition 100 0 -2\n", State.WEAK),
        ("/dev/dm-0 partition 100 0 -2\n", State.OK),
        ("/dev/dm-1 partition 100 0 -2\n", State.WEAK),
        ("/dev/dm-0 partition 100 0 -2\n/swapfile file 100 0 -3\n", State.WEAK),
    ],
)
def test_swap_is_weak_unless_it_is_encrypted_or_memory(tmp_path: Path, swaps: str, state: State) -> None:
    line = doctor.swap_line(machine(tmp_path, swaps))
    assert line.state == state
    assert bool(line.advice) == (state == State.WEAK)


def test_memory_that_is_locked_is_never_swapped(tmp_path: Path) -> None:
    root = machine(tmp_path, "/swapfile file 100 0 -2\n")
    assert doctor.swap_line(root).state == State.WEAK
    assert doctor.swap_line(root, locked=True).state == State.OK


def test_locked_is_what_the_kernel_says_too(seen: Probe) -> None:
    """The process alone may be wrong: what is in memory is compared with what the kernel counts as locked."""
    for said, locked, resident, expected in (
        (True, 100, 100, True),
        (True, 99, 100, False),
        (False, 100, 100, False),
    ):
        look = replace(seen.secure, locked_bytes=locked, resident_bytes=resident)
        measures = Measures(memory_locked=said)
        assert doctor.memory_locked(replace(seen, secure=look, measures=measures)) == expected
    assert seen.secure.resident_bytes > 1 << 20


@pytest.mark.parametrize(("at", "state"), [("a", State.OK), ("a/b", State.OK), (".", State.WEAK)])
def test_a_cgroup_that_may_not_swap_is_enough(tmp_path: Path, at: str, state: State) -> None:
    root = machine(tmp_path, "/swapfile file 100 0 -2\n")
    (root / "sys" / "fs" / "cgroup" / at / "memory.swap.max").write_text("0\n")
    assert doctor.swap_line(root).state == state


# Keys


def test_a_device_key_that_others_can_read_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "device.key"
    assert doctor.key_line(None).state == State.UNUSED
    assert doctor.key_line(str(path)).state == State.BROKEN
    write_key(path, DeviceKey.generate())
    assert doctor.key_line(str(path)).state == State.OK
    path.chmod(0o640)
    line = doctor.key_line(str(path))
    assert line.state == State.BROKEN
    assert line.advice == f"chmod 600 {path}"


def test_a_credential_is_looked_for_where_systemd_puts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_key(tmp_path / "device.key", DeviceKey.generate())
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert doctor.key_line("credential:device.key").state == State.BROKEN
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "device.key").chmod(0o440)
    assert doctor.key_line("credential:device.key").state == State.OK


def test_a_trust_store_that_others_can_write_is_broken(tmp_path: Path) -> None:
    store = TrustStore(tmp_path / "trusted")
    store.trust(VendorKey.generate().public)
    assert "1 trusted vendor" in doctor.trust_line(store).found
    assert doctor.trust_line(store).state == State.OK
    store.directory.chmod(0o777)
    assert doctor.trust_line(store).state == State.BROKEN


# The network


def test_doctor_says_that_there_is_no_tls_as_long_as_the_server_has_none() -> None:
    line = doctor.network_line()
    assert line.state == State.UNUSED
    assert "loopback" in line.advice
    server = Path(doctor.__file__).parents[2] / "server"
    assert not [file for file in server.rglob("*.py") if "import ssl" in file.read_text()]
