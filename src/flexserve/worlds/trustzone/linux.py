"""Debian's own arm64 kernel as the normal world: what it boots from, and where to get it.

The kernel and busybox come as Debian's packages, unchanged, by apt with a configuration of its own: the host needs no
second architecture. Its first files are busybox, our Flex-Mem manager (firmware/linux) and one script. Does not know
what the script does.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import EngineFailure, NotFound
from . import firmware
from .devicetree import machine_tree
from .machine import Machine, interact

KERNEL, TREE, FILES = 0x40200000, 0x47000000, 0x48000000  # firmware/include/memlayout.h
STORE = firmware.SOURCES.parent / ".cache" / "debian-arm64"
PACKAGES = ("linux-image-arm64", "busybox-static")
ARGUMENTS = "console=ttyAMA0 panic=1 quiet"
GREETING = "linux ready"
SCRIPT = f"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
echo "{GREETING}: $(/bin/busybox nproc) cpus, $(/bin/busybox uname -r)"
"""


@dataclass(frozen=True)
class Debian:
    """Files of the packages."""

    kernel: Path
    busybox: Path
    module: Path  # any that needs no other: an attack puts its own code into a copy


def find() -> Debian:
    """What `fetch` got. Raises `NotFound`."""
    kernels = sorted(STORE.glob("boot/vmlinuz-*-arm64"))
    busybox = STORE / "bin" / "busybox"
    modules = sorted(STORE.glob("lib/modules/*-arm64/kernel/drivers/net/dummy.ko"))
    if not kernels or not modules or not busybox.exists():
        raise NotFound(
            "Debian's arm64 kernel is not here", hint="`make tz-linux` gets it (60 MB, Debian host)"
        )
    return Debian(kernels[-1], busybox, modules[-1])


def fetch() -> Debian:
    """Get the packages of the host's own Debian release, unless they are here.

    Raises `NotFound` without apt, `EngineFailure` if it fails.
    """
    with suppress(NotFound):
        return find()
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise NotFound(
            "there is no apt-get here", hint=f"put {' and '.join(PACKAGES)} for arm64 into {STORE}"
        )
    state = STORE / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    settings = {
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",
    }
    options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    _run(["apt-get", *options, "-qq", "update"])
    depends = _run(["apt-cache", *options, "depends", "--important", PACKAGES[0]])
    image = next(line.split()[-1] for line in depends.splitlines() if "Depends:" in line)
    _run(["apt-get", *options, "-qq", "download", image, PACKAGES[1]], cwd=state)
    for package in state.glob("*.deb"):
        _run(["dpkg-deb", "-x", str(package), str(STORE)])
        package.unlink()
    return find()


def _run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        raise EngineFailure(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """A cpio archive (newc), which a kernel unpacks as its first files: name to (mode, content)."""
    out = bytearray()
    for number, (name, (mode, content)) in enumerate({**files, "TRAILER!!!": (0, b"")}.items(), 1):
        encoded = name.encode() + b"\0"
        head = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        out += b"070701" + "".join(f"{field:08X}" for field in head).encode() + encoded
        out += bytes(-len(out) % 4) + content
        out += bytes(-len(out) % 4)
    return bytes(out)


def boot(debian: Debian, script: str = "") -> Machine:
    """A machine whose normal world is Linux. After the greeting its init runs `script`, then ends the machine.

    Raises what `firmware.build` raises.
    """
    return Machine(*_images(debian, script))


def shell(debian: Debian) -> int:
    """Linux's root shell on the caller's terminal, until `exit`. Raises what `firmware.build` raises."""
    size = shutil.get_terminal_size()  # a serial line does not tell
    script = (
        f"/bin/busybox stty -F /dev/ttyAMA0 rows {size.lines} cols {size.columns}\n"
        f"export HOME=/tmp TERM={shlex.quote(os.environ.get('TERM', 'vt100'))}\ncd /tmp\n"
        "/bin/busybox setsid /bin/busybox cttyhack /bin/busybox sh -i\n"
    )
    return interact(*_images(debian, script))


def _images(debian: Debian, script: str) -> tuple[bytes, dict[int, bytes]]:
    """The flash image, and what lies in memory."""
    built = firmware.build(linux=True)
    init = SCRIPT + script + "\n/bin/busybox poweroff -f\n"
    files = archive(
        {
            "bin": (0o040755, b""),
            "bin/busybox": (0o100755, debian.busybox.read_bytes()),
            "bin/manager": (0o100755, (built.directory / "manager").read_bytes()),
            "dev": (0o040755, b""),
            "init": (0o100755, init.encode()),
            "lib": (0o040755, b""),
            "lib/victim.ko": (0o100644, debian.module.read_bytes()),
        }
    )
    tree = machine_tree(range(FILES, FILES + len(files)), ARGUMENTS)
    return built.flash, {KERNEL: debian.kernel.read_bytes(), TREE: tree, FILES: files}
