"""packaging/flexserve.service run by a systemd, set up by the commands at its top: what it promises is looked at from
outside, and `flexserve doctor` says what it finds within the same walls."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexserve.worlds.linux import landlock, users

from ..sealed_fixtures import SMALL
from ..world_fixtures import Device, make_device
from .systemd_box import Box, missing, systemd_box
from .test_inspection import FACTS
from .test_two_users import PYTHON, ROOT, SITES, ids, needs_python

UNIT = ROOT / "packaging" / "flexserve.service"
LOG, SEEN = "/var/log/flexserve.log", "/var/log/doctor.json"
CREDENTIAL = "/run/credentials/flexserve.service/device.key"
CAP_RESOURCE = 24
WHY_NOT = missing()
pytestmark = [
    pytest.mark.slow,
    needs_python,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"no systemd of its own here: {WHY_NOT}"),
]
# What the unit says at its top; the programs come from this checkout.
INSTALL = f"""
echo 'flexserve:x:990:990::/nonexistent:/usr/sbin/nologin' >> "$ROOT/etc/passwd"
echo 'flexserve:x:990:' >> "$ROOT/etc/group"
rm -rf "$ROOT/opt/flexserve"
chroot "$ROOT" {PYTHON} -m venv --without-pip /opt/flexserve
site=$(echo "$ROOT"/opt/flexserve/lib/python3.*/site-packages)
number=0
for lib in {shlex.join([*SITES, str(ROOT / "src")])}; do  # a checkout may lie where the unit may not look
  number=$((number + 1))
  mkdir -p "$ROOT/opt/flexserve/libs/$number"
  mount --bind "$lib" "$ROOT/opt/flexserve/libs/$number"
  echo "/opt/flexserve/libs/$number" >> "$site/flexserve.pth"
done
program="$ROOT/opt/flexserve/bin/flexserve"
printf '#!/opt/flexserve/bin/python3 -B\\nfrom flexserve.cli import main\\nmain()\\n' > "$program"
chmod 755 "$program"
cp "$FILES"/*.service "$ROOT/etc/systemd/system/"
mkdir "$ROOT/etc/systemd/system/flexserve.service.d"
printf '[Service]\\nStandardOutput=append:{LOG}\\nStandardError=append:{LOG}\\nEnvironment=FLEXSERVE_CALIBRATE=0\\n' \\
  > "$ROOT/etc/systemd/system/flexserve.service.d/test.conf"
rm -rf "$ROOT/etc/flexserve" "$ROOT/var/lib/flexserve"
mkdir -p "$ROOT/etc/flexserve" "$ROOT/var/lib/flexserve/models"
install -m 600 "$FILES/device.key" "$ROOT/etc/flexserve/"
install -m 644 "$FILES/assistant.flex" "$FILES/assistant.lic" "$ROOT/var/lib/flexserve/models/"
cp "$FILES/vendor.pub" "$ROOT/tmp/"
XDG_CONFIG_HOME=/etc chroot "$ROOT" /opt/flexserve/bin/flexserve keys trust /tmp/vendor.pub >&2
"""
ASK = """
import json, sys, urllib.error, urllib.request
body = {"model": "assistant", "prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
headers = {"content-type": "application/json"}
request = urllib.request.Request("http://127.0.0.1:8080/v1/completions", json.dumps(body).encode(), headers)
try:
    print(json.load(urllib.request.urlopen(request, timeout=50))["flexserve"]["token_ids"])
except urllib.error.HTTPError as error:
    sys.exit(f"{error.code}: {error.read()}")
"""


def doctors_unit() -> str:
    """The unit with `flexserve doctor` in place of the server: the same walls around it."""
    text = UNIT.read_text()
    for line, instead in (
        (
            r"ExecStart=.*",
            "ExecStart=/opt/flexserve/bin/flexserve doctor --json --device-key credential:device.key",
        ),
        (r"Type=exec", f"Type=oneshot\nStandardOutput=file:{SEEN}\nStandardError=append:{LOG}"),
        (r"Restart=on-failure", ""),
        # systemd gives a directory to the last unit that names it, and takes it away at its end.
        (r"(State|Runtime)Directory=flexserve", r"\1Directory=flexserve-doctor"),
    ):
        text, count = re.subn(f"^{line}$", instead, text, flags=re.MULTILINE)
        assert count, line
    return text


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with tempfile.TemporaryDirectory() as name:
        made = make_device(Path(name))
        made.add_kit("assistant", SMALL)
        (made.directory / UNIT.name).write_text(UNIT.read_text())
        (made.directory / "flexserve-doctor.service").write_text(doctors_unit())
        yield made


@pytest.fixture(scope="module")
def box(device: Device) -> Iterator[Box]:
    prepare = f"FILES={shlex.quote(str(device.directory))}\n{INSTALL}"
    with (
        tempfile.TemporaryDirectory() as mounts,
        systemd_box(Path(mounts), "flexserve.service", prepare) as started,
    ):
        yield started


@pytest.fixture(scope="module")
def service(box: Box) -> Box:
    wait_for(box, lambda: "FlexServe is ready" in log(box))
    return box


def log(box: Box) -> str:
    path = box.file(LOG)
    return path.read_text() if path.exists() else ""


def wait_for(box: Box, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        state = box.show("flexserve", "ActiveState", "Result", "ExecMainStatus")
        assert time.monotonic() < deadline and state["ActiveState"] != "failed", f"{state}\n{log(box)}"
        time.sleep(0.05)


def ask(box: Box) -> str:
    done = box.run("/opt/flexserve/bin/python3", "-c", ASK)
    assert done.returncode == 0, f"{done.stderr}\n{log(box)}"
    return done.stdout


def main_pid(box: Box) -> int:
    """Of the gateway, as this machine numbers it: the first of the unit's processes."""
    return box.processes("flexserve")[0]


def secure_pids(box: Box) -> list[int]:
    return [
        pid for pid in box.processes("flexserve") if b"launch.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def _host(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def limit(pid: int, name: str) -> str:
    (line,) = (x for x in Path(f"/proc/{pid}/limits").read_text().splitlines() if x.startswith(name))
    return line.removeprefix(name).split()[0]


def test_systemd_starts_it_and_it_answers(service: Box) -> None:
    assert ask(service).count(",") == 7
    assert "the gateway is user flexserve now, and the secure process another" in log(service)


def test_its_processes_are_three_users_behind_filters_without_a_power(service: Box) -> None:
    gateway, starter, *secure = service.processes("flexserve")
    assert len(secure) == 3 and secure == secure_pids(service)
    assert ids(gateway, "Uid") == {990}
    assert ids(starter, "Uid") == {0}, "it starts secure processes, and nobody talks to it"
    (secure_user,) = {uid for pid in secure for uid in ids(pid, "Uid")}
    assert secure_user in users.DYNAMIC_USERS
    for pid in (gateway, starter, *secure):
        status = users.status(pid)
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        assert limit(pid, "Max core file size") == "0"
        powers = {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")}
        assert powers == ({0b111100000} if pid == starter else {0}), "KILL, SETGID, SETUID, SETPCAP"
        assert int(status["CapAmb"], 16) == 0


@pytest.mark.parametrize("line_id", sorted(FACTS))
def test_what_proc_shows_of_a_secure_process_holds_for_systemds_too(service: Box, line_id: str) -> None:
    assert {FACTS[line_id](pid) for pid in secure_pids(service)} == {True}


def test_the_device_key_is_a_credential_that_neither_of_them_can_read(service: Box) -> None:
    gateway, starter, secure, *_ = service.processes("flexserve")
    key = Path(f"/proc/{starter}/root{CREDENTIAL}")
    assert key.stat().st_uid == 0 and key.stat().st_mode & 0o077 == 0
    for pid in (gateway, secure):
        (uid,) = ids(pid, "Uid")
        within = (
            "nsenter",
            "-t",
            str(pid),
            "-m",
            "setpriv",
            f"--reuid={uid}",
            f"--regid={uid}",
            "--clear-groups",
        )
        read = _host(*within, "cat", CREDENTIAL)
        assert read.returncode != 0 and "Permission denied" in read.stderr


def test_files_and_devices_are_what_the_unit_leaves_it(service: Box) -> None:
    """By root, within the gateway's mounts."""

    def within(*command: str) -> bool:
        return _host("nsenter", "-t", str(main_pid(service)), "-m", *command).returncode == 0

    for own, mode in (("/var/lib/flexserve", 0o711), ("/run/flexserve", 0o700)):
        assert service.file(own).stat().st_mode & 0o7777 == mode
    assert within("test", "-w", "/var/lib/flexserve")
    assert within("test", "-w", "/run/flexserve")
    for closed in ("/etc", "/usr", "/opt/flexserve", "/var/log", "/proc/sys/vm", "/sys/fs/cgroup"):
        assert not within("touch", f"{closed}/by-test"), closed
    assert not within("test", "-e", "/dev/kmsg") and within("test", "-e", "/dev/urandom")
    assert _host(
        "nsenter", "-t", str(main_pid(service)), "-m", "ls", "-A", "/root", "/home"
    ).stdout.split() == [
        "/home:",
        "/root:",
    ]


def test_doctor_finds_every_promise_kept_within_the_same_walls(service: Box) -> None:
    done = service.run("systemctl", "start", "flexserve-doctor")
    assert done.returncode == 0, f"{done.stderr}\n{log(service)}\n{service.file(SEEN).read_text()}"
    report: dict[str, Any] = json.loads(service.file(SEEN).read_text())
    states = {line["id"]: line["state"] for line in report["lines"]}
    assert report["holds"]
    kept = [
        "user", "secure_process", "secure_user", "capabilities", "memory", "ptrace", "core", "no_new_privs", "seccomp",
        "descriptors", "environment", "userfaultfd", "device_key", "trust_store",
        *(["landlock"] if landlock.version() else []),
    ]  # fmt: skip
    assert {name: states[name] for name in kept} == dict.fromkeys(kept, "ok"), report


def test_memory_may_not_be_swapped_and_may_be_locked(service: Box) -> None:
    asked = service.show("flexserve", "MemorySwapMax", "LimitMEMLOCK", "LimitCORE")
    assert asked == {"MemorySwapMax": "0", "LimitMEMLOCK": "infinity", "LimitCORE": "0"}
    if int(users.status("self")["CapEff"], 16) >> CAP_RESOURCE & 1:  # else this systemd may raise no limit
        assert limit(secure_pids(service)[0], "Max locked memory") == "unlimited"
        assert int(users.status(secure_pids(service)[0])["VmLck"].split()[0]) > 1024


def test_a_dead_secure_process_is_started_again_as_a_user_without_powers(service: Box) -> None:
    before, old = ask(service), secure_pids(service)
    os.kill(old[0], signal.SIGKILL)
    wait_for(service, lambda: len(secure_pids(service)) == 3 and old[0] not in secure_pids(service))
    assert ask(service) == before
    assert all(users.status(pid)["CapEff"] == "0" * 16 for pid in secure_pids(service))


def test_a_killed_gateway_is_started_again_and_takes_everything_up(service: Box) -> None:
    before, old = ask(service), service.processes("flexserve")
    said = log(service).count("FlexServe is ready")
    os.kill(old[0], signal.SIGKILL)
    wait_for(service, lambda: log(service).count("FlexServe is ready") == said + 1)
    assert set(service.processes("flexserve")).isdisjoint(old), "nothing of it is left"
    assert ask(service) == before
    assert service.show("flexserve", "NRestarts") == {"NRestarts": "1"}


def test_it_stops_cleanly_and_leaves_nothing_running(service: Box) -> None:
    gateway = main_pid(service)
    done = service.run("systemctl", "stop", "flexserve")
    assert done.returncode == 0
    stopped = service.show("flexserve", "ActiveState", "Result", "ExecMainStatus")
    assert stopped == {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
    assert service.processes("flexserve") == []
    assert not Path(f"/proc/{gateway}").exists()
