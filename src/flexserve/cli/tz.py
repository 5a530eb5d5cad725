"""`flexserve tz`: the trustzone world. Boot it, use it, attack it, measure it."""

from __future__ import annotations

import shlex
import sys
from contextlib import suppress
from typing import Any

import click

from ..errors import FlexServeError
from .common import print_json

NOT_BLOCKED = NOT_MET = NOT_READY = 1
SILENCE_S = 120.0
CODE_IS = "flexserve: the commands' code is "


@click.group("tz")
def command() -> None:
    """The trustzone world: our firmware on an emulated Arm machine (docs/firmware.md)."""


@command.command("attack")
@click.option("--only", metavar="ID", multiple=True, help="Run this attack only (may be repeated).")
@click.option("--list", "listing", is_flag=True, help="Name the attacks and run none.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object (docs/schemas/tz-attack.json).")
def attack(*, only: tuple[str, ...], listing: bool, as_json: bool) -> None:
    """Attack the firmware as a compromised kernel would, and show that every attack can succeed without its defence.

    Exit code 0: every attack is blocked and every control succeeded. 1: one did not. Builds the firmware when
    its sources changed; needs qemu-system-aarch64 and gcc-aarch64-linux-gnu.
    """
    from ..worlds.trustzone import attacks

    chosen = attacks.attacks(only)
    if listing:
        for one in chosen:
            click.echo(f"{one.id:<20} {one.mechanism}: {one.tried}")
        return
    rows = attacks.run(chosen, None if as_json else lambda row: click.echo(_line(row)))
    report = attacks.summary(rows)
    if as_json:
        print_json(report)
    else:
        click.echo(verdict(report))
    if not all(row.blocked and row.control_succeeded for row in rows):
        sys.exit(NOT_BLOCKED)


@command.command("bench")
@click.option("--json", "as_json", is_flag=True, help="One JSON object (docs/schemas/tz-bench.json).")
def bench(*, as_json: bool) -> None:
    """Measure what protection costs, and compare each number with its limit (about a minute on a quiet machine).

    Exit code 0: every limit is met. 1: one is not, or could not be measured.
    """
    from ..worlds.trustzone import bench as trustzone_bench

    report = trustzone_bench.run(lambda text: click.echo(f"measuring: {text}", err=True))
    if as_json:
        print_json(report)
    else:
        for number in report["numbers"]:
            click.echo(number_line(number))
    if report["met"] < len(report["numbers"]):
        sys.exit(NOT_MET)


@command.command("boot")
@click.option("--fetch", is_flag=True, help="Get Debian's arm64 kernel and busybox first (60 MB, by apt).")
@click.option(
    "--run", "commands", metavar="COMMANDS", default="", help="What Linux's shell (busybox sh) runs as root."
)
def boot(*, fetch: bool, commands: str) -> None:
    """Boot Debian's own kernel as the normal world, under the firmware, and print what it prints until it ends.

    Exit code 1: the commands failed, or did not end before the machine did.
    """
    from ..worlds.trustzone import linux
    from ..worlds.trustzone.machine import Ended

    debian = linux.fetch() if fetch else linux.find()
    # In a shell of its own: `exit` in Linux's first process would be a panic.
    script = f'/bin/busybox sh -c {shlex.quote(commands)}\necho "{CODE_IS}$?"' if commands else ""
    code = None
    with linux.boot(debian, script) as machine, suppress(Ended):
        while True:
            line = machine.line(SILENCE_S)
            before, found, after = line.partition(CODE_IS)
            if commands and found:  # what was printed without a line's end comes before
                code, line = after.strip(), before
            if line or not found:
                click.echo(line)
    if commands and code != "0":
        ended = "did not end" if code is None else f"ended with code {code}"
        raise FlexServeError(f"the commands {ended}: {commands}")


@command.command("shell")
def shell() -> None:
    """Boot Debian's own kernel under the firmware, with a root shell on this terminal; `exit` ends the machine.

    `manager` is the Flex-Mem manager: it reads `give 512`, `fill 1`, `sum`, `take 512`, `stats`, `window 100` (ms),
    `protection` and `quit`.
    """
    from ..worlds.trustzone import linux

    debian = linux.find()
    click.echo(
        "booting Linux under the firmware: `exit` ends the machine, `manager` manages Flex-Mem", err=True
    )
    sys.exit(linux.shell(debian))


@command.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="One JSON object (docs/schemas/tz-doctor.json).")
def doctor(*, as_json: bool) -> None:
    """What the trustzone world needs and has here, and what this machine cannot enforce.

    Exit code 0: nothing is missing.
    """
    from ..worlds.trustzone import doctor as trustzone_doctor

    report = trustzone_doctor.report()
    if as_json:
        print_json(report)
    else:
        for check in report["checks"]:
            click.echo(f"{check['state']:<8} {check['name']}: {check['detail']}")
    if not report["ready"]:
        sys.exit(NOT_READY)


def _line(row: Any) -> str:
    """One row of the table."""
    return line(row.as_dict())


def line(row: dict[str, Any]) -> str:
    """A row of docs/schemas/tz-attack.json as a line of text."""
    good = row["blocked"] and row["control_succeeded"]
    state = "blocked" if good else "NOT BLOCKED" if not row["blocked"] else "NO CONTROL"
    return (
        f"{state:<11} {row['id']:<20} {row['tried']}\n"
        f"{'':<32} expected {row['expected']}; seen {row['with_defence']}\n"
        f"{'':<32} control ({row['control'].replace('_', ' ')}): {row['without_defence']}"
    )


def number_line(number: dict[str, Any]) -> str:
    """A row of docs/schemas/tz-bench.json as a line of text."""
    value = "missing" if number["value"] is None else f"{number['value']:.2f}"
    limit = f"at {number['limit_is']} {number['limit']:g} {number['unit']}"
    state = "met" if number["met"] else "NOT MET"
    why = number["why_missing"] or number["what"]
    return f"{state:<8} {number['name']:<24} {value:>8}  {limit:<28} {why}"


def verdict(report: dict[str, Any]) -> str:
    """The last line of the table."""
    return (
        f"\n{report['blocked']} of {report['attacks']} attacks blocked, {report['controls_succeeded']} controls "
        f"succeeded, {report['mechanisms']} classes of mechanism; QEMU {report['qemu']}"
    )
