"""`flexserve tz doctor`: what the trustzone world needs and has here, and what this machine cannot enforce."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...errors import NotFound
from . import firmware, linux
from .machine import qemu_version

LIMITS = (
    (
        "SMMU stage",
        "stage 1: every PCI function sees one 2 MiB window that cannot be donated. QEMU before 8.1 has no stage 2, and "
        "newer ones are used alike",
    ),
    (
        "SMMU before its start",
        "QEMU lets devices pass while the SMMU is off: EL3 turns it on before any other image runs",
    ),
    (
        "DMA and stage 2",
        "an emulated device that is not a PCI function passes by: fw_cfg and virtio-mmio are hidden",
    ),
    ("caches, timing, physical access", "not emulated: nothing follows about them"),
)


@dataclass(frozen=True)
class Check:
    """`state`: ok, missing, or limit (of this machine, and no fault)."""

    name: str
    state: str
    detail: str


def checks() -> list[Check]:
    """In the order in which they are printed."""
    found = []
    missing = firmware.missing_tools()
    sources = firmware.SOURCES.is_dir()
    found.append(
        Check("tools", "missing", f"{', '.join(missing)}: {firmware.INSTALL}")
        if missing
        else Check("tools", "ok", "cross compiler, its C library, make, QEMU")
    )
    if firmware.QEMU_NAME not in missing:
        found.append(Check("qemu", "ok", qemu_version()))
    found.append(
        Check(
            "sources",
            "ok" if sources else "missing",
            str(firmware.SOURCES) if sources else "work in a checkout",
        )
    )
    try:
        found.append(Check("linux", "ok", linux.find().kernel.name))
    except NotFound as error:
        found.append(Check("linux", "missing", f"{error.message}: {error.hint}"))
    return found + [Check(name, "limit", text) for name, text in LIMITS]


def report() -> dict[str, Any]:
    """The object of docs/schemas/tz-doctor.json."""
    rows = checks()
    return {"ready": all(row.state != "missing" for row in rows), "checks": [asdict(row) for row in rows]}
