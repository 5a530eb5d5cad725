"""The time to the first token while another process holds memory (paper, figure 7).

    sealed           as it is served: the memory manager takes back and gives, the rest of the model stays resident
    sealed_no_cache  nothing stays resident from one request to the next
    plain_mmap       llama.cpp on the unencrypted file, a new process each time, as much in the page cache as there is

Every side is asked twice at every level and its second answer counts: the first finds what the level before left.
Knows how to bring the machine to a level; prints nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import EngineFailure
from ..normal.manager import MemoryManager
from ..normal.policy import MIB, Settings
from . import machine
from .hog import STEP_BYTES, Hog
from .memory import meminfo_bytes
from .plain import Job, PlainProcess
from .sides import SealedWorld

LEVELS = (2.0, 1.0, 0.75, 0.5)  # memory left, in sizes of the model
WATERMARKS = Settings(256 * MIB, 384 * MIB, 64 * MIB, calm_s=3.0)
RESERVE_BYTES = (
    512 * MIB
)  # left at every level beside that: the high watermark, and what the machine's others take
SIDES = ("sealed", "sealed_no_cache", "plain_mmap")
LAZY_S = 60.0  # at most, until idle weights are handed over


@dataclass(frozen=True)
class PressedStart:
    """One answer at one level."""

    side: str
    left_bytes: int  # that were to be left beside the process that holds memory
    available_bytes: int  # just before, as the kernel counts
    resident_bytes: int | None  # of weights, just before; None: not ours
    ttft_s: float
    token_ids: tuple[int, ...]


@contextmanager
def managed(world: SealedWorld, log: list[str]) -> Iterator[None]:
    """The memory manager over a world, with watermarks that suit a bench."""
    manager = MemoryManager(world.world, log.append, settings=WATERMARKS)
    manager.start()
    try:
        yield
    finally:
        manager.close()


def press(hog: Hog, held: int, left_bytes: int, ours: int = 0) -> int:
    """Have the hog leave so much beside the reserve; what it holds then. `held`: what it held before. `ours`: weights
    in memory, which are part of what is left.

    Raises `EngineFailure` when the machine has less anyway.
    """
    wanted = held + meminfo_bytes("MemAvailable") + ours - left_bytes - RESERVE_BYTES
    if wanted < 0:
        raise EngineFailure(
            f"{left_bytes + RESERVE_BYTES >> 20} MiB of available memory are needed, and there is less",
            hint="end other programs, or measure a smaller shape",
        )
    while held < wanted - STEP_BYTES:  # in parts, so that the manager can follow
        held = hog.hold(min(wanted, held + 8 * STEP_BYTES))
    return hog.hold(wanted)


def sealed(world: SealedWorld, token_ids: list[int], left_bytes: int, *, cached: bool) -> PressedStart:
    """With `cached`, as the manager leaves it; otherwise cold."""
    name = "sealed" if cached else "sealed_no_cache"
    for _ in range(2):
        if not cached:
            world.empty()
        status = world.world.status().models[0]
        available = meminfo_bytes("MemAvailable")
        sample = world.ask(token_ids, give=not cached)
        last = PressedStart(
            name, left_bytes, available, status.resident_bytes, sample.ttft_s, sample.token_ids
        )
    return last


def plain(world: SealedWorld, token_ids: list[int], left_bytes: int) -> PressedStart:
    """In a new process, twice."""
    s = world.settings
    job = Job(str(world.model.gguf), "mmap", False, token_ids, s.output_tokens, s.threads, s.context_tokens)
    for _ in range(2):
        with PlainProcess() as process:
            available = meminfo_bytes("MemAvailable")
            got = process.run(job)
        last = PressedStart("plain_mmap", left_bytes, available, None, got.ttft_s, tuple(got.token_ids))
    return last


def levels(
    world: SealedWorld, token_ids: list[int], log: list[str], fractions: tuple[float, ...] = LEVELS
) -> list[PressedStart]:
    """Every side at every level, from much memory to little. Raises `EngineFailure` when answers differ.

    One side at a time goes through all levels, so that none has another's memory.
    """
    weights = world.model.weight_bytes
    found: list[PressedStart] = []
    for side in SIDES:
        world.empty()
        machine.evict(world.model.gguf)
        for path in world.files:
            machine.evict(path)
        with Hog() as hog:
            held = 0
            if side == "sealed":
                world.give_memory()
                with managed(world, log):
                    for fraction in fractions:
                        left = round(fraction * weights)
                        held = press(hog, held, left, _resident(world))
                        found.append(sealed(world, token_ids, left, cached=True))
                continue
            for fraction in fractions:
                left = round(fraction * weights)
                held = press(hog, held, left)
                one = plain(world, token_ids, left) if side == "plain_mmap" else None
                found.append(one or sealed(world, token_ids, left, cached=False))
    if len({one.token_ids for one in found}) > 1:
        raise EngineFailure("answers under memory pressure differ")
    return found


def _resident(world: SealedWorld) -> int:
    return world.world.status().models[0].resident_bytes


@dataclass(frozen=True)
class LazyUnderPressure:
    """What became of weights that were handed to the kernel."""

    handed_bytes: int
    taken_bytes: int  # by the kernel, without any call: the secure process's memory fell by that much
    same_answer: bool


def lazily(world: SealedWorld, token_ids: list[int]) -> LazyUnderPressure:
    """Leave the model alone until its weights are lazy, have another process take memory, and ask again.

    No memory manager: the kernel helps itself. Raises `EngineFailure` when nothing is handed over.
    """
    before = world.ask(token_ids).token_ids
    end = time.monotonic() + LAZY_S
    while not (handed := world.world.status().models[0].lazy_bytes):
        if time.monotonic() > end:
            raise EngineFailure(f"no idle weights were handed to the kernel within {LAZY_S:.0f} s")
        time.sleep(0.2)
    resident = resident_bytes(world.pid)
    with Hog() as hog:
        press(hog, 0, 0)
        taken = resident - resident_bytes(world.pid)
    return LazyUnderPressure(handed, max(taken, 0), world.ask(token_ids).token_ids == before)


def resident_bytes(pid: int) -> int:
    """VmRSS of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise EngineFailure(f"process {pid} does not say what memory it has")
