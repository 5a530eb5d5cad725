"""How many threads compute and how many load: chosen from a short calibration, stored for every later start.

The normal side measures, below two seconds, and stores what it found in this user's state directory. Reading is
measured on the sealed file that is about to be served. Knows rates and arithmetic; does not know how loading works
(flexmem/loader.py), nor any model.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ...core import ROW_UNIT_SIZE
from ...errors import EngineFailure, FlexServeError, StorageFailure
from ...flexmem import uffd
from ...flexmem.loader import WORKERS
from ...flexmem.processors import PROCESSORS
from ...flexmem.uffd import UffdDeniedError, Userfaultfd
from ...sealed.files import pwrite_all, replacing, xdg_directory
from . import rates

DEPTHS = (1, 2, 4, 8)
READ_BYTES = 32 << 20  # for each depth: a third of a second of a slow disk
DECRYPT_S = 0.03
PLACE_BYTES = 64 << 20
BLOCK_BYTES = uffd.HUGE_PAGE  # what a worker reads, decrypts and places at a time
FEWEST_WORKERS, MOST_WORKERS = 2, 8
ENOUGH = 0.95  # of the best rate: more threads for the rest are not worth what they take from compute
UNDISTURBED = 0.8  # of the processors, for this process
MAX_FILE_BYTES = 1 << 16


class Rates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes per second. Decrypting and placing: of one thread. `compute`: what so many threads do together of a
    computation that stays in their caches (decrypting small units): processors that share a core add nothing."""

    read: dict[int, float]  # by requests in flight, past the page cache
    decrypt: float
    place: float
    compute: dict[int, float]  # by threads


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured, on which machine."""

    processors: tuple[int, ...]
    processor: str  # the model's name
    rates: Rates


@dataclass(frozen=True)
class Tuning:
    """What is chosen from it."""

    threads: int
    load_workers: int


def choose(found: Rates) -> Tuning:
    """As few threads as compute nearly as fast as any number; as many workers as keep storage busy.

    A worker waits for its read and then computes. So that the best number of reads is in flight all the time, there
    are so many more workers as blocks arrive while one is decrypted and placed.
    """
    threads = _fewest(found.compute)
    depth = _fewest(found.read)
    work_s = BLOCK_BYTES / found.decrypt + BLOCK_BYTES / found.place
    workers = math.ceil(depth + work_s * found.read[depth] / BLOCK_BYTES)
    return Tuning(threads, min(max(workers, FEWEST_WORKERS), MOST_WORKERS))


def describe(found: Rates) -> str:
    """What is chosen, and the rates it is chosen from."""
    tuning = choose(found)
    read, decrypt, place = (
        f"{rate / 1e9:.1f} GB/s" for rate in (max(found.read.values()), found.decrypt, found.place)
    )
    return (
        f"{tuning.threads} threads compute and {tuning.load_workers} load "
        f"(storage {read}; one thread decrypts {decrypt} and places {place})"
    )


def _fewest(by_count: dict[int, float]) -> int:
    """The smallest number that is nearly as good as the best."""
    best = max(by_count.values())
    return min(count for count, rate in by_count.items() if rate >= ENOUGH * best)


def default() -> Tuning:
    """Without a calibration."""
    return Tuning(len(PROCESSORS), WORKERS)


def check_undisturbed() -> None:
    """What is measured beside other programs would be wrong for every later start. Raises `EngineFailure`."""
    count = len(PROCESSORS)
    wall, used = time.perf_counter(), time.process_time()
    rates.decrypt_bytes_per_s(DECRYPT_S, unit=ROW_UNIT_SIZE, threads=count)
    share = (time.process_time() - used) / (time.perf_counter() - wall) / count
    if share < UNDISTURBED:
        raise EngineFailure(
            f"other programs use {100 * (1 - share):.0f} % of the processors; the next start tries again"
        )


def measure(sealed: Path) -> Calibration:
    """Measure this machine, and the storage that this file is on. Raises `StorageFailure`."""
    processors = tuple(sorted(PROCESSORS))
    count = len(processors)
    found = Rates(
        {depth: rates.read_bytes_per_s(sealed, READ_BYTES, depth=depth) for depth in DEPTHS},
        rates.decrypt_bytes_per_s(DECRYPT_S),
        _place_bytes_per_s(),
        {
            threads: rates.decrypt_bytes_per_s(DECRYPT_S, unit=ROW_UNIT_SIZE, threads=threads)
            for threads in sorted({max(count // 2, 1), count})
        },
    )
    return Calibration(processors, processor_name(), found)


def _place_bytes_per_s() -> float:
    try:
        faults = Userfaultfd()
    except UffdDeniedError:  # segments are copied then, which costs about the same
        return rates.decrypt_bytes_per_s(DECRYPT_S)
    target = uffd.reserve(PLACE_BYTES, align=uffd.HUGE_PAGE)
    try:
        with contextlib.suppress(OSError):
            uffd.advise(target, PLACE_BYTES, uffd.MADV_HUGEPAGE)
        faults.register(target, PLACE_BYTES)
        return 1e9 / rates.copy_s_per_gb(faults, target, PLACE_BYTES)
    finally:
        faults.close()
        uffd.release(target, PLACE_BYTES)


# What is stored


def calibration_path() -> Path:
    """$XDG_STATE_HOME/flexserve/calibration.json, or below ~/.local/state."""
    return xdg_directory("XDG_STATE_HOME", ".local/state") / "calibration.json"


def stored(path: Path | None = None) -> Calibration | None:
    """What was measured before, if it was on this machine with these processors; else None. A file that is damaged
    is as good as none."""
    try:
        with (path or calibration_path()).open("rb") as file:
            found = msgspec.json.decode(file.read(MAX_FILE_BYTES), type=Calibration)
    except (OSError, msgspec.DecodeError, FlexServeError):
        return None
    here = tuple(sorted(PROCESSORS)), processor_name()
    return found if _usable(found.rates) and (found.processors, found.processor) == here else None


def _usable(found: Rates) -> bool:
    """Whether something can be chosen from these rates."""
    counts = (*found.read, *found.compute)
    values = (*found.read.values(), *found.compute.values(), found.decrypt, found.place)
    return bool(found.read and found.compute) and min(counts) >= 1 and min(values) > 0


def store(found: Calibration, path: Path | None = None) -> None:
    """Keep it for later starts. Raises `StorageFailure`."""
    path = path or calibration_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageFailure(f"cannot make {path.parent}: {error.strerror}") from error
    with replacing(path) as fd:
        os.fchmod(fd, 0o600)
        pwrite_all(fd, msgspec.json.format(msgspec.json.encode(found)), 0)


def processor_name() -> str:
    """As the kernel calls it; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part")))
    return next(named, "")
