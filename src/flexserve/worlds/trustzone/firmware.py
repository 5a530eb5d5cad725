"""Builds the firmware and keeps it: one flash image for release, one whose defences can be switched off.

Knows `firmware/Makefile` and its tools. Does not know QEMU (machine.py) or attacks (attacks.py).
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ...errors import EngineFailure, NotFound

SOURCES = Path(__file__).resolve().parents[4] / "firmware"
CROSS = "aarch64-linux-gnu-"
QEMU_NAME = "qemu-system-aarch64"
INSTALL = (
    "apt-get install qemu-system-arm gcc-aarch64-linux-gnu libc6-dev-arm64-cross make (or `make tz` as root)"
)
MARKER = b"DEFENCES SWITCHED OFF: \0"


def missing_tools() -> list[str]:
    """Programs the trustzone world needs and this machine lacks."""
    tools = (f"{CROSS}gcc", f"{CROSS}objcopy", "make", QEMU_NAME)
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return missing or ([] if _has_libc() else ["libc6-dev-arm64-cross"])


def _has_libc() -> bool:
    """Whether the cross compiler has a C library for Linux's programs."""
    command = [f"{CROSS}gcc", "-print-file-name=libc.a"]
    out = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return Path(out.strip()).is_absolute()


def require_tools() -> None:
    """Raises `NotFound` naming what is missing."""
    if missing := missing_tools():
        raise NotFound(f"the trustzone world needs {', '.join(missing)}", hint=INSTALL)


@dataclass(frozen=True)
class Firmware:
    """A built flash image, and where the images in it lie."""

    flash: bytes
    directory: Path

    def without(self, defences: frozenset[str]) -> bytes:
        """The flash image with these defences (or M_BATCH) switched off. Only a control build has the switch.

        Raises `EngineFailure` when this is a release build.
        """
        bits = _bits("[DM]")
        mask = sum(bits[name] for name in defences)
        at = self.flash.find(MARKER)
        if at < 0:
            raise EngineFailure("a release build has no defence to switch off")
        at += len(MARKER)
        return self.flash[:at] + mask.to_bytes(8, "little") + self.flash[at + 8 :]

    def image_offset(self, name: str) -> int:
        """Where `el2`, `sel1` or `normal` begins in the flash image."""
        return self.flash.index((self.directory / f"{name}.bin").read_bytes())


def defence_bits() -> dict[str, int]:
    """The defences of firmware/include/defences.h by name, without the `D_`."""
    return _bits("D")


def _bits(prefix: str) -> dict[str, int]:
    text = (SOURCES / "include" / "defences.h").read_text()
    found = re.findall(rf"#define {prefix}_(\w+) \(1u << (\d+)\)", text)
    return {name: 1 << int(bit) for name, bit in found}


def build(*, controls: bool = False, linux: bool = False) -> Firmware:
    """Build unless the sources are those of the last build.

    `linux`: what enters a Linux kernel, not the attacker's; with `manager`, a program for that Linux, beside it.

    Raises `NotFound` when sources or tools are missing, `EngineFailure` when the compiler refuses.
    """
    if not SOURCES.is_dir():
        raise NotFound(
            "this installation has no firmware sources", hint="work in a checkout of the repository"
        )
    require_tools()
    name = "controls" if controls else "linux" if linux else "release"
    out = SOURCES.parent / "build" / "firmware" / name
    stamp, image = out / "sources.sha256", out / "firmware.bin"
    digest = _sources_digest()
    if not (image.exists() and stamp.exists() and stamp.read_text() == digest):
        out.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        command = ["make", "-B", "-C", str(SOURCES), f"OUT={out}", *(["CONTROLS=1"] if controls else [])]
        command += ["LINUX=1", f"{out}/firmware.bin", f"{out}/manager"] if linux else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EngineFailure(f"the firmware does not build: {done.stderr.strip()[-2000:]}")
        stamp.write_text(digest)
    return Firmware(image.read_bytes(), out)


def _sources_digest() -> str:
    total = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.is_file() and path.suffix in {".c", ".h", ".S", ".lds", ""}:
            total.update(str(path.relative_to(SOURCES)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()
