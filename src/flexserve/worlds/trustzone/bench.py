"""`flexserve tz bench`: what the firmware costs, measured in the machine itself, against limits.

The measurements are firmware/normal/bench.c's, which prints samples; here are medians, ratios and limits. Both sides of
a ratio are measured in one run. Instruction counts come from a machine with QEMU's -icount, so that they repeat.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from ...errors import EngineFailure, NotFound
from . import firmware, linux
from .attacks import ATTACK_S, BOOT_S, READY
from .machine import Machine, qemu_version

Samples = dict[str, list[int]]
ICOUNT = ("-icount", "shift=0,sleep=off")
BYTES = 64 << 20
BOOTS = 3
PER_PAGE = frozenset({"BATCH"})


@dataclass(frozen=True)
class Limit:
    """A number to reach: at most (or at least) so much."""

    name: str
    unit: str
    bound: float
    least: bool
    what: str

    def met(self, value: float) -> bool:
        return value >= self.bound if self.least else value <= self.bound


LIMITS = (
    Limit(
        "protect_64mb_ms", "ms", 1, False, "DONATE of 16,384 scattered pages, until the trusted OS has them"
    ),
    Limit("recall_gb_s", "GB/s", 3, True, "RECLAIM of the same pages, zeroed and mapped back"),
    Limit(
        "protect_batch_ratio", "x", 8, True, "the same DONATE with one TLB invalidation per page takes longer"
    ),
    Limit(
        "recall_batch_ratio", "x", 3, True, "the same RECLAIM with one TLB invalidation per page takes longer"
    ),
    Limit(
        "carve_out_ratio",
        "x",
        8,
        True,
        "a contiguous 64 MB region in use, its pages migrated first, takes longer",
    ),
    Limit("async_return_percent", "%", 2, False, "an asynchronous RECLAIM returns, of the synchronous one"),
    Limit("hvc_instructions", "instructions", 150, False, "HVC VERSION and back (-icount)"),
    Limit("reenable_ms", "ms", 3, False, "PROTECT_ON with a second busy CPU"),
    Limit(
        "request_on_ms",
        "ms",
        15,
        False,
        "a word in the request page, until it is answered and protection is on, both CPUs busy",
    ),
    Limit("linux_boot_s", "s", 6, False, "from QEMU's start to Debian's first program"),
    Limit(
        "stage2_overhead_percent",
        "%",
        5,
        False,
        "heap sort of 65,536 records over 11 MB, stage 2 on against off",
    ),
)


@dataclass(frozen=True)
class Number:
    """A measured value beside its limit. `value` None: it could not be measured, and `why`."""

    limit: Limit
    value: float | None
    samples: int
    why: str = ""

    @property
    def met(self) -> bool:
        return self.value is not None and self.limit.met(self.value)

    def as_dict(self) -> dict[str, Any]:
        """A row of docs/schemas/tz-bench.json."""
        return {
            "name": self.limit.name,
            "value": self.value,
            "unit": self.limit.unit,
            "limit": self.limit.bound,
            "limit_is": "least" if self.limit.least else "most",
            "met": self.met,
            "samples": self.samples,
            "what": self.limit.what,
            "why_missing": self.why,
        }


def parse(lines: Iterable[str]) -> Samples:
    """Samples by name, in nanoseconds. Raises `EngineFailure` for a line that says that something went wrong."""
    samples: Samples = defaultdict(list)
    for line in lines:
        kind, _, rest = line.partition(" ")
        if kind != "sample":
            raise EngineFailure(f"the measurement says: {line}")
        name, value = rest.split()
        samples[name].append(int(value, 16))
    return dict(samples)


def measure(flash: bytes, names: Iterable[str], options: tuple[str, ...] = ()) -> Samples:
    """Run measurements of firmware/normal/bench.c, one after the other on one machine. Raises `EngineFailure`."""
    lines = []
    with Machine(flash, options=options) as machine:
        machine.wait_for(READY, BOOT_S)
        for name in names:
            machine.send(f"time {name}")
            while not (line := machine.line(ATTACK_S)).startswith("timed "):
                lines.append(line)
    return parse(lines)


def linux_boots(progress: Callable[[str], None]) -> tuple[list[float], str]:
    """Seconds of some boots of Debian's kernel; or why there are none."""
    try:
        debian = linux.find()
    except NotFound as error:
        return [], f"{error.message}: {error.hint}"
    took = []
    for number in range(BOOTS):
        progress(f"booting Linux, {number + 1} of {BOOTS}")
        start = time.monotonic()
        with linux.boot(debian) as machine:
            machine.wait_for(linux.GREETING, BOOT_S)
            took.append(time.monotonic() - start)
    return took, ""


def run(progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """All measurements: the object of docs/schemas/tz-bench.json. Raises `NotFound` and `EngineFailure`."""
    release, controls = firmware.build(), firmware.build(controls=True)
    progress("pages, blocks, the carve-out and the switch of protection")
    timed = measure(release.flash, ["pages", "blocks", "carve-out", "switch", "request"])
    progress("the same with one TLB invalidation per page")
    per_page = measure(controls.without(PER_PAGE), ["pages"])
    progress("a workload with stage 2 on and off")
    timed |= measure(release.flash, ["stage2"])
    progress("instructions")
    counted = measure(release.flash, ["calls", "pages-alone", "polls"], ICOUNT)
    boots, no_linux = linux_boots(progress)
    return report(numbers(timed, per_page, counted, boots, no_linux), counted)


def numbers(
    timed: Samples, per_page: Samples, counted: Samples, boots: list[float], no_linux: str = ""
) -> list[Number]:
    """Values beside their limits."""
    middle = {name: median(values) for name, values in timed.items()}
    slow = {name: median(values) for name, values in per_page.items()}
    # Halves of a round lie side by side in time; a ratio of each is less disturbed than a ratio of medians.
    pairs = zip(timed["workload_on"], timed["workload_off"], strict=True)
    values: dict[str, tuple[float | None, int]] = {
        "protect_64mb_ms": (middle["protect"] / 1e6, len(timed["protect"])),
        "recall_gb_s": (BYTES / middle["recall"], len(timed["recall"])),
        "protect_batch_ratio": (slow["protect"] / middle["protect"], len(per_page["protect"])),
        "recall_batch_ratio": (slow["recall"] / middle["recall"], len(per_page["recall"])),
        "carve_out_ratio": (middle["carve_out"] / middle["protect"], len(timed["carve_out"])),
        "async_return_percent": (100 * middle["async"] / middle["recall"], len(timed["async"])),
        "hvc_instructions": (median(counted["hvc_10000"]) / 10_000, len(counted["hvc_10000"])),
        "reenable_ms": (middle["switch_on"] / 1e6, len(timed["switch_on"])),
        "request_on_ms": (middle["request_on"] / 1e6, len(timed["request_on"])),
        "linux_boot_s": (median(boots) if boots else None, len(boots)),
        "stage2_overhead_percent": (
            100 * (median(on / off for on, off in pairs) - 1),
            len(timed["workload_on"]),
        ),
    }
    return [
        Number(limit, *values[limit.name], why=no_linux if values[limit.name][0] is None else "")
        for limit in LIMITS
    ]


def report(rows: list[Number], counted: Samples) -> dict[str, Any]:
    """The object of docs/schemas/tz-bench.json."""
    return {
        "qemu": qemu_version(),
        "met": sum(row.met for row in rows),
        "numbers": [row.as_dict() for row in rows],
        # A tick of -icount's clock is one instruction; for regressions only.
        "instructions": {name: int(median(values)) for name, values in counted.items()},
    }
