"""`flexserve bench cold-start`: a sealed model's cold start against plain llama.cpp's, both in one run.

Random weights in a true shape, uniformly random prompt ids from a new printed seed per round. Every measurement
of every side is prepared alike: first the side (its process, its skeleton, the page cache), then free memory
(memory.py), then at once the answer. The order of the sides turns from round to round. What a side is, is in
sides.py; what the numbers come to, in report.py.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EngineFailure, Usage
from ..flexmem.processors import PROCESSORS
from ..worlds.linux.rates import decrypt_bytes_per_s, read_bytes_per_s
from . import machine, memory, processor, rates
from .files import BenchModel, Progress, Say, prepare_model
from .memory import Condition, FreeMemory, MemoryState
from .plain import LOAD_MODES, Job, PlainProcess
from .processor import BUSY_CORES, BUSY_S
from .report import Measured, Round, Run, report
from .shapes import shape_named
from .sides import PlainSide, Sample, SealedSide, SealedWorld, Settings, Side

LONG_PROMPT_TOKENS = 512
STORAGE_DEPTH = 4  # segments in flight while a round's read rate is measured
PLAIN_SIDES = (*(f"plain_cold_{mode}" for mode in LOAD_MODES), "plain_warm")
REPACK_SIDES = ("plain_cold_repack", "plain_warm_repack")  # where llama.cpp repacks this quantisation
SEALED_SIDES = ("sealed_cold", "sealed_sequential", "sealed_resident")
LONG_SIDES = ("sealed_cold_long", "sealed_resident_long")
LAYOUT_SIDES = (
    "sealed_cold_layout",
    "sealed_resident_layout",
)  # from the device's own copy; where it repacks
USUAL_SIDES = (*PLAIN_SIDES, *REPACK_SIDES, *SEALED_SIDES, *LONG_SIDES, *LAYOUT_SIDES)
UNHARDENED_SIDES = (
    "unhardened_cold",
    "unhardened_resident",
)  # the control of what hardening costs; if asked for
ALL_SIDES = (*USUAL_SIDES, *UNHARDENED_SIDES)


@dataclass(frozen=True)
class ColdStartOptions:
    """What to measure."""

    shape: str = "llama-3.2-1b"
    quant: str = "Q8_0"
    prompt_tokens: int = 128
    output_tokens: int = 33
    rounds: int = 3
    states: tuple[MemoryState, ...] = tuple(MemoryState)
    sides: tuple[str, ...] = USUAL_SIDES
    directory: Path = Path("bench")
    threads: int = 0  # 0: all cores

    def __post_init__(self) -> None:
        unknown = [side for side in self.sides if side not in ALL_SIDES]
        if unknown or not self.sides:
            raise Usage(
                f"no side is called {unknown[0]!r}" if unknown else "no side is to be measured",
                hint=f"there are {', '.join(ALL_SIDES)}",
            )

    @property
    def compute_threads(self) -> int:
        return self.threads or len(PROCESSORS)

    @property
    def long_prompt_tokens(self) -> int | None:
        """None when no side of it is measured."""
        wanted = self.prompt_tokens < LONG_PROMPT_TOKENS and any(s in self.sides for s in LONG_SIDES)
        return LONG_PROMPT_TOKENS if wanted else None

    @property
    def settings(self) -> Settings:
        tokens = max(self.prompt_tokens, self.long_prompt_tokens or 0) + self.output_tokens
        return Settings(self.compute_threads, max(512, tokens), self.output_tokens)


@dataclass
class _Bench:
    """The sides of one run, and the worlds behind the sealed ones."""

    sides: list[Side] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    pipelined: SealedWorld | None = None
    sequential: SealedWorld | None = None
    layout: SealedWorld | None = None
    unhardened: SealedWorld | None = None

    def close(self) -> None:
        for side in self.sides:
            side.done()
        for world in (self.pipelined, self.sequential, self.layout, self.unhardened):
            if world is not None:
                world.close()


def run(options: ColdStartOptions, say: Say, progress: Progress | None = None) -> dict[str, Any]:
    """Measure; the result is what `--json` prints (docs/schemas/bench-cold-start.json).

    Raises `Usage`, `StorageFailure`, and `EngineFailure` when a cold start is not cold or two answers differ.
    """
    model = prepare_model(options.directory, options.shape, options.quant, say, progress)
    say("measuring the rates of this machine's parts")
    placing = rates.placing()
    decrypt = decrypt_bytes_per_s(rates.DECRYPT_S)
    repacked_bytes = _repacked_bytes(model, options)
    bench = _Bench()
    rounds: dict[MemoryState, list[Round]] = {}
    try:
        _make_sides(bench, model, options, repacked_bytes, say)
        # Idle first: after `backed` it takes long until the host has everything back.
        for state in sorted(options.states, reverse=True):
            free = memory.free_memory(state, _need_bytes(model))
            try:
                rounds[state] = [
                    _round(
                        bench.sides,
                        free,
                        f"{state}, round {n + 1} of {options.rounds}",
                        n,
                        model,
                        options,
                        say,
                    )
                    for n in range(options.rounds)
                ]
            finally:
                free.close()
        world = bench.pipelined
        return report(
            Run(
                machine=machine.describe(),
                shape=options.shape,
                quant=options.quant,
                prompt_tokens=options.prompt_tokens,
                long_prompt_tokens=options.long_prompt_tokens,
                output_tokens=options.output_tokens,
                threads=options.compute_threads,
                weight_bytes=model.weight_bytes,
                disk_bytes=model.disk_bytes,
                repacked_bytes=repacked_bytes,
                decrypt_bytes_per_s=decrypt,
                placing=placing,
                register_s=world.register_s if world else None,
                register_resident_bytes=world.register_resident_bytes if world else None,
                skipped=bench.skipped,
                rounds=rounds,
            )
        )
    finally:
        bench.close()


def draw_one(options: ColdStartOptions, path: Path, say: Say) -> None:
    """Record one more pipelined cold start from inside and draw it (plot.py). Raises what `run` does."""
    from .plot import draw, require_matplotlib
    from .timeline import record

    require_matplotlib()
    model = prepare_model(options.directory, options.shape, options.quant, lambda _text: None)
    settings, state, seed = options.settings, min(options.states), secrets.randbits(32)
    say(f"recording one cold start in {state} memory, seed {seed}")
    free = memory.free_memory(state, _need_bytes(model))
    try:
        timeline = record(
            model,
            random_prompt(seed, options.shape, options.prompt_tokens),
            free,
            threads=settings.threads,
            context_tokens=settings.context_tokens,
        )
    finally:
        free.close()
    title = f"{options.shape} {options.quant}, {options.prompt_tokens} tokens, cold, {state} memory"
    draw(timeline, title, path)
    say(f"{path}: first token after {timeline.ttft_s:.3f} s")


def _need_bytes(model: BenchModel) -> int:
    """What any side may take: the file in the page cache and the weights in memory, and room for the rest."""
    return 2 * model.weight_bytes + (1 << 30)


def _repacked_bytes(model: BenchModel, options: ColdStartOptions) -> int:
    """How much of the model llama.cpp repacks for this processor: it is asked."""
    with PlainProcess() as process:
        settings = options.settings
        job = Job(str(model.gguf), "mmap", True, [0], 1, settings.threads, settings.context_tokens)
        return process.run(job).repacked_bytes


def _make_sides(
    bench: _Bench, model: BenchModel, options: ColdStartOptions, repacked_bytes: int, say: Say
) -> None:
    settings = options.settings
    nothing = f"llama.cpp repacks nothing of {options.quant} on this processor"

    def plain(name: str, mode: str, *, cold: bool, repack: bool = False) -> None:
        if name not in options.sides:
            return
        if repack and not repacked_bytes:
            bench.skipped[name] = nothing
        elif mode == "mlock" and not machine.may_lock(model.weight_bytes):
            bench.skipped[name] = "this user may not lock that much memory (RLIMIT_MEMLOCK)"
        else:
            bench.sides.append(PlainSide(name, model, settings, mode=mode, cold=cold, repack=repack))

    for mode in LOAD_MODES:
        plain(f"plain_cold_{mode}", mode, cold=True)
    plain("plain_cold_repack", "mmap", cold=True, repack=True)
    plain("plain_warm", "mmap", cold=False)
    plain("plain_warm_repack", "mmap", cold=False, repack=True)

    sealed = [*SEALED_SIDES, *UNHARDENED_SIDES]
    if options.long_prompt_tokens is not None:
        sealed += LONG_SIDES
    if repacked_bytes:
        sealed += LAYOUT_SIDES
    else:
        bench.skipped |= {name: nothing for name in LAYOUT_SIDES if name in options.sides}
    warm_up = random_prompt(0, options.shape, options.prompt_tokens)
    for name in sealed:
        if name not in options.sides:
            continue
        if name in LAYOUT_SIDES:
            if bench.layout is None:
                say("starting the secure world in execution layout")
                bench.layout = SealedWorld(model, settings, warm_up=warm_up, layout=True)
            world = bench.layout
        elif name in UNHARDENED_SIDES:
            if bench.unhardened is None:
                say("starting the secure world without hardening")
                bench.unhardened = SealedWorld(model, settings, warm_up=warm_up, hardened=False)
            world = bench.unhardened
        elif name == "sealed_sequential":
            say("starting the secure world that loads before it computes")
            world = bench.sequential = SealedWorld(model, settings, warm_up=warm_up, on_demand=False)
        else:
            if bench.pipelined is None:
                say("starting the secure world")
                bench.pipelined = SealedWorld(model, settings, warm_up=warm_up)
            world = bench.pipelined
        bench.sides.append(SealedSide(name, world, cold="resident" not in name))


def random_prompt(seed: int, shape: str, count: int) -> list[int]:
    """Uniformly random token ids."""
    ids = np.random.default_rng(seed).integers(0, shape_named(shape).vocabulary, count)
    return [int(token) for token in ids]


def _round(  # noqa: PLR0917
    sides: list[Side],
    free: FreeMemory,
    title: str,
    number: int,
    model: BenchModel,
    options: ColdStartOptions,
    say: Say,
) -> Round:
    """Every side once."""
    seed = secrets.randbits(32)
    busy = processor.busy_cores(BUSY_S)
    if busy > BUSY_CORES:
        say(f"other programs keep {busy:.1f} cores busy: these times are longer than this machine's")
    read_rate = max(read_bytes_per_s(model.gguf, rates.READ_BYTES, depth=STORAGE_DEPTH) for _ in range(2))
    say(f"{title}, seed {seed}, storage reads {read_rate / 1e9:.2f} GB/s")
    short = random_prompt(seed, options.shape, options.prompt_tokens)
    long = random_prompt(seed, options.shape, options.long_prompt_tokens or 0)
    measured: dict[str, Measured] = {}
    for side in turned(sides, number):
        measured[side.name] = _measure(side, free, long if side.name in LONG_SIDES else short)
        say(_line(side.name, measured[side.name]))
    _check_tokens(sides, measured)
    return Round(seed, read_rate, busy, measured)


def _line(name: str, m: Measured) -> str:
    others = m.sample.other_cpu_s / m.sample.ttft_s
    return (
        f"  {name:<22}{m.sample.ttft_s:7.3f} s{m.sample.decode_tokens_per_s:8.1f} tokens/s"
        f"   first touch {m.condition.first_touch_s_per_gb:.2f} s/GB"
        + (f"   others used {others:.1f} cores" if others > BUSY_CORES else "")
    )


def turned(sides: list[Side], number: int) -> list[Side]:
    """The order of round `number`: forwards and backwards in turn, each pair beginning with other sides."""
    turn = number // 2 % len(sides)
    order = sides[turn:] + sides[:turn]
    return order[::-1] if number % 2 else order


def _measure(side: Side, free: FreeMemory, token_ids: list[int]) -> Measured:
    """Prepare the side, then free memory, then go: between the last two lies only the probe."""
    try:
        side.ready(token_ids)
        free.prepare()
        side.check()
        reported, steal = memory.reported_bytes(), processor.steal_s()
        start = time.perf_counter()
        condition: Condition = free.release()
        gap_s = time.perf_counter() - start
        sample: Sample = side.go()
        steal_s, after = processor.steal_s() - steal, memory.reported_bytes()
        handed_back = None if reported is None or after is None else after - reported
        return Measured(sample, condition, gap_s, steal_s, handed_back)
    finally:
        side.done()


def _check_tokens(sides: Iterable[Side], measured: dict[str, Measured]) -> None:
    """Sides with the same prompt and kernels must have answered the same, or their times mean nothing."""
    answers: dict[tuple[str, bool], tuple[str, tuple[int, ...]]] = {}
    for side in sides:
        ids = measured[side.name].sample.token_ids
        first, expected = answers.setdefault((side.kernels, side.name in LONG_SIDES), (side.name, ids))
        if ids != expected:
            raise EngineFailure(f"{side.name} and {first} answered the same prompt differently")
