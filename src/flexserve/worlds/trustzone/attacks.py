"""Runs the attack suite: every attack against the release firmware, and its control, which must succeed.

A row is blocked when the attack, run against the release build, did not get what it wanted. Its control shows that the
attack can get it: against the control build with the defence switched off (all overlapping ones for `layers_off`), each
in a boot of its own, or against an unprotected twin on the release build. Knows attacks.toml; the attacks' code is in
firmware/normal/.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import NotFound
from . import firmware, linux
from .firmware import Firmware
from .machine import Hung, Machine, qemu_version

READY = "attacker ready"
REBOOTS = frozenset({"reset-residue"})
ENDS_THE_SECOND_CPU = frozenset({"psci-level"})
STOPPED = "is not the one"
PANIC = "el3 stops"
HOW = ("real", "twin")
BEHIND_SMMU = "disable-legacy=on,iommu_platform=on"
DEVICES = (
    *("-drive", "if=none,id=disk,format=raw,file={folder}/disk"),
    *("-device", f"virtio-blk-pci,drive=disk,{BEHIND_SMMU}", "-device", f"virtio-rng-pci,{BEHIND_SMMU}"),
)
SIGBUS = 128 + 7  # as a shell tells that a signal ended a program
ENDED = {0: True, 1: False, SIGBUS: False}  # anything else: the attack could not be tried
BOOT_S = 300.0  # a busy host is slow
ATTACK_S = 300.0


@dataclass(frozen=True)
class Attack:
    """A row of attacks.toml."""

    id: str
    attacker: str
    mechanism: str
    tried: str
    expected: str
    off: tuple[str, ...] = ()
    command: str = ""  # of Linux's root: the manager or a busybox applet, with arguments
    twin: str = ""
    stops: bool = False  # without its defence EL3 stops; of Linux's root: the attack ends the machine

    @property
    def control(self) -> str:
        """How its positive control is run."""
        return ("unprotected_twin", "defence_off")[len(self.off)] if len(self.off) < 2 else "layers_off"


@dataclass(frozen=True)
class Seen:
    """What one run of an attack saw. `achieved` None: the machine did not answer."""

    achieved: bool | None
    text: str


@dataclass(frozen=True)
class Row:
    """An attack's two runs."""

    attack: Attack
    with_defence: Seen
    without_defence: Seen

    @property
    def blocked(self) -> bool:
        return self.with_defence.achieved is False

    @property
    def control_succeeded(self) -> bool:
        return self.without_defence.achieved is True

    def as_dict(self) -> dict[str, Any]:
        """A row of docs/schemas/tz-attack.json."""
        return {
            "id": self.attack.id,
            "attacker": self.attack.attacker,
            "mechanism": self.attack.mechanism,
            "tried": self.attack.tried,
            "expected": self.attack.expected,
            "with_defence": self.with_defence.text,
            "blocked": self.blocked,
            "control": self.attack.control,
            "switched_off": list(self.attack.off),
            "without_defence": self.without_defence.text,
            "control_succeeded": self.control_succeeded,
        }


def attacks(only: Iterable[str] = ()) -> list[Attack]:
    """All attacks, or those named. Raises `NotFound` for an unknown id."""
    table = tomllib.loads(Path(__file__).with_name("attacks.toml").read_text(encoding="utf-8"))
    every = [Attack(id=name, **{**row, "off": tuple(row.get("off", ()))}) for name, row in table.items()]
    names = list(only)
    if unknown := sorted(set(names) - {attack.id for attack in every}):
        raise NotFound(
            f"there is no attack {', '.join(unknown)}", hint="`flexserve tz attack --list` names them"
        )
    return [attack for attack in every if not names or attack.id in names]


def run(chosen: list[Attack], progress: Callable[[Row], None] | None = None) -> list[Row]:
    """Run attacks and controls. Raises `NotFound` and `EngineFailure` of `firmware.build`."""
    release, controls = firmware.build(), firmware.build(controls=True)
    real = _against(release.flash, [(a.id, "real") for a in chosen if a.attacker == "kernel"])
    twins = [(a.id, "twin") for a in chosen if a.control == "unprotected_twin" and a.attacker == "kernel"]
    twin = _against(release.flash, twins)
    under_linux = _under_linux([attack for attack in chosen if attack.command and not attack.stops])
    for attack in chosen:
        if attack.command and attack.stops:
            under_linux |= _under_linux([attack], HOW[:1]) | _under_linux([attack], HOW[1:])
    rows = []
    for attack in chosen:
        if attack.attacker == "storage":
            row = _changed_image(attack, release, controls)
        elif attack.command:
            row = Row(attack, under_linux[attack.id, "real"], under_linux[attack.id, "twin"])
        elif attack.off:
            flash = controls.without(frozenset(attack.off))
            run_off = _stops if attack.stops else lambda flash, name: _against(flash, [(name, "real")])[name]
            row = Row(attack, real[attack.id], run_off(flash, attack.id))
        else:
            row = Row(attack, real[attack.id], twin[attack.id])
        rows.append(row)
        if progress is not None:
            progress(row)
    return rows


def repeat(name: str, times: int) -> list[Seen]:
    """The same attack again and again on one machine, for failures that come rarely. Raises `Hung`."""
    with Machine(firmware.build().flash, options=DEVICES) as machine:
        machine.wait_for(READY, BOOT_S)
        return [_one(machine, name, "real") for _ in range(times)]


def _against(flash: bytes, runs: list[tuple[str, str]]) -> dict[str, Seen]:
    """The runs one after the other on one machine; a new one after one that hung or lost its second CPU."""
    seen: dict[str, Seen] = {}
    todo = list(runs)
    while todo:
        with Machine(flash, options=DEVICES) as machine:
            try:
                machine.wait_for(READY, BOOT_S)
            except Hung as error:
                return seen | {name: Seen(None, error.message) for name, _ in todo}
            while todo:
                name, how = todo.pop(0)
                try:
                    seen[name] = _one(machine, name, how)
                except Hung as error:
                    seen[name] = Seen(None, error.message)
                    break
                if name in ENDS_THE_SECOND_CPU:
                    break
    return seen


def _stops(flash: bytes, name: str) -> Seen:
    """An attack after which EL3 says that it stops."""
    with Machine(flash, options=DEVICES) as machine:
        try:
            machine.wait_for(READY, BOOT_S)
            machine.send(f"real {name}")
            machine.wait_for_secure(PANIC, BOOT_S)
        except Hung as error:
            return Seen(None, error.message)
        said = machine.secure()
    return Seen(True, said[said.index(PANIC) :].strip())


def _one(machine: Machine, name: str, how: str) -> Seen:
    machine.send(f"{how} {name}")
    if name in REBOOTS:
        machine.wait_for("resetting", ATTACK_S)
        machine.wait_for(READY, BOOT_S)
        machine.send(f"{how} {name}")
    while True:
        line = machine.line(ATTACK_S)
        if line.startswith(("set-up failed", "unexpected", "unknown")):
            return Seen(None, line)
        if line.startswith("outcome "):
            _, told, kind, result, value, text = line.split(" ", 5)
            if (told, kind) != (name, how):
                return Seen(None, f"an answer about {told} {kind}")
            return Seen(result == "achieved", f"{text} ({value})")


def _under_linux(chosen: list[Attack], hows: tuple[str, ...] = HOW) -> dict[tuple[str, str], Seen]:
    """Attacks of Linux's root, one after the other in one boot; each must leave the kernel alive to tell of it."""
    every = [(one.id, how, one.command if how == "real" else one.twin) for one in chosen for how in hows]
    seen = {(name, how): Seen(None, "Linux ended before") for name, how, _ in every}
    if not chosen:
        return seen
    try:
        debian = linux.find()
    except NotFound as error:
        return dict.fromkeys(seen, Seen(None, f"{error.message}: {error.hint}"))
    script = "".join(
        f'got=$({_program(command)} 2>&1); code=$?; echo; echo "row {name} {how} $code $got"\n'
        for name, how, command in every
    )
    with linux.boot(debian, script) as machine:
        try:
            machine.wait_for(linux.GREETING, BOOT_S)
            for _ in every:
                _, name, how, status, *text = machine.wait_for("row ", ATTACK_S).split(" ")
                said = "SIGBUS" if int(status) == SIGBUS else f"exit code {status}"
                seen[name, how] = Seen(ENDED.get(int(status)), " ".join([said, *text]).strip())
        except Hung as error:
            return {key: Seen(None, error.message) if s.achieved is None else s for key, s in seen.items()}
    return seen


def _program(command: str) -> str:
    return f"/bin/{command}" if command.startswith("manager ") else f"/bin/busybox {command}"


def _changed_image(attack: Attack, release: Firmware, controls: Firmware) -> Row:
    name = attack.id.removeprefix("image-")
    return Row(
        attack, _boots(_changed(release, name), False), _boots(_changed(controls, name, attack.off), True)
    )


def _changed(built: Firmware, name: str, off: tuple[str, ...] = ()) -> bytes:
    """A flash image with one byte changed that no code reads: the last of the image's padding, or of its text."""
    flash = bytearray(built.without(frozenset(off)) if off else built.flash)
    size = (built.directory / f"{name}.bin").stat().st_size
    flash[built.image_offset(name) + size - 1] ^= 1
    return bytes(flash)


def _boots(flash: bytes, wanted: bool) -> Seen:
    with Machine(flash, options=DEVICES) as machine:
        try:
            if wanted:
                machine.wait_for(READY, BOOT_S)
                return Seen(True, "it boots")
            machine.wait_for_secure(STOPPED, BOOT_S)
        except Hung as error:
            return Seen(None, error.message)
        return Seen(False, machine.secure().strip())


def summary(rows: list[Row]) -> dict[str, Any]:
    """The object of docs/schemas/tz-attack.json."""
    return {
        "qemu": qemu_version(),
        "attacks": len(rows),
        "mechanisms": len({row.attack.mechanism for row in rows}),
        "blocked": sum(row.blocked for row in rows),
        "controls_succeeded": sum(row.control_succeeded for row in rows),
        "rows": [row.as_dict() for row in rows],
    }
