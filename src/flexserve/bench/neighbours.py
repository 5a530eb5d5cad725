"""`flexserve bench neighbours`: real applications beside a model that is asked now and then (paper, figure 10).

    none          no model at all: what the applications do alone
    flexserve     as it is served: idle weights are lazy, the memory manager takes back and gives
    always_cache  nothing is ever given back
    no_cache      everything is given back after every answer
    timer         everything is given back some time after the last answer

Another process holds memory, so that the applications' data and a part of the model fit, and not all of it. The pauses
between requests and the timer are both short: a timer of 5 s and a pause of 10 s stand for 5 and 10 minutes.
Knows running worlds and processes; what the applications do is in neighbour.py.
"""

from __future__ import annotations

import itertools
import secrets
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import Usage
from ..flexmem.processors import PROCESSORS
from . import machine, processor
from .background import managed, press
from .cold_start import random_prompt
from .files import BenchModel, Progress, Say, prepare_model
from .hog import Hog
from .neighbour import KINDS, Neighbour, make_database, make_file
from .processor import BUSY_CORES, BUSY_S
from .sides import SealedWorld, Settings
from .stats import Spread

SIDES = ("none", "flexserve", "always_cache", "no_cache", "timer")


@dataclass(frozen=True)
class NeighboursOptions:
    """What to measure. Times in seconds; `model_share` of the weights fits beside the applications' data."""

    shape: str = "llama-3.2-1b"
    quant: str = "Q8_0"
    prompt_tokens: int = 128
    data_bytes: int = 1 << 30  # of each application
    model_share: float = 0.25
    every_s: float = 10.0  # a request
    timer_s: float = 5.0
    measure_s: float = 60.0
    warm_s: float = 20.0  # of the applications, before anything is measured
    sides: tuple[str, ...] = SIDES
    directory: Path = Path("bench")
    threads: int = 0  # 0: all cores

    def __post_init__(self) -> None:
        unknown = [side for side in self.sides if side not in SIDES]
        if unknown or not self.sides:
            raise Usage(
                f"no side is called {unknown[0]!r}" if unknown else "no side is to be measured",
                hint=f"there are {', '.join(SIDES)}",
            )
        if not 0 < self.timer_s < self.every_s <= self.measure_s:
            raise Usage(
                "the timer must be shorter than the pause between requests, and that than the measurement"
            )

    @property
    def settings(self) -> Settings:
        return Settings(self.threads or len(PROCESSORS), max(512, 2 * self.prompt_tokens), 8)


def run(options: NeighboursOptions, say: Say, progress: Progress | None = None) -> dict[str, Any]:
    """Measure; the result is what `--json` prints (docs/schemas/bench-neighbours.json).

    Raises `Usage`, `StorageFailure`, `EngineFailure`.
    """
    model = prepare_model(options.directory, options.shape, options.quant, say, progress)
    data = prepare_data(options, say)
    busy = processor.busy_cores(BUSY_S)
    if busy > BUSY_CORES:
        say(f"other programs keep {busy:.1f} cores busy: they are neighbours too")
    seed = secrets.randbits(32)
    say(f"seed {seed}")
    found: dict[str, dict[str, Any]] = {}
    for side in options.sides:
        found[side] = _side(side, options, model, data, seed)
        row = found[side]
        say(
            f"  {side:<13}{row['sqlite_queries_per_s']:9.0f} queries/s {row['reader_bytes_per_s'] / 1e6:8.0f} MB/s"
            + (f"   first token {row['ttft_s']['median']:.2f} s" if row["ttft_s"] else "")
        )
    return {
        "bench": "neighbours",
        "machine": machine.describe(),
        **{k: v for k, v in asdict(options).items() if k not in ("sides", "directory", "threads")},
        "threads": options.settings.threads,
        "weight_bytes": model.weight_bytes,
        "seed": seed,
        "other_busy_cores": busy,
        "sides": against_none(found),
    }


def against_none(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """With the applications' rates as shares of what they do alone; None when that was not measured."""
    alone = found.get("none")
    for row in found.values():
        for name in ("sqlite_queries_per_s", "reader_bytes_per_s"):
            share = f"{name.split('_', maxsplit=1)[0]}_vs_none"
            row[share] = row[name] / alone[name] if alone and alone[name] else None
    return found


def prepare_data(options: NeighboursOptions, say: Say) -> dict[str, Path]:
    """Each application's data, made once and kept. Raises `StorageFailure` when the disk is too small."""
    paths = {kind: options.directory / f"neighbour-{options.data_bytes}.{kind}" for kind in KINDS}
    for kind, path in paths.items():
        if not path.exists():
            say(f"making {path}")
            (make_database if kind == "sqlite" else make_file)(path, options.data_bytes)
    return paths


@contextmanager
def _policy(side: str, world: SealedWorld, log: list[str]) -> Iterator[None]:
    """What keeps memory or gives it back, beside what is done after an answer."""
    world.give_memory()
    if side == "flexserve":
        with managed(world, log):
            yield
        return
    if side == "always_cache" and world.world.status().budget is not None:
        world.world.budget(floor_bytes=2 * world.model.weight_bytes)
    yield


def _side(
    side: str, options: NeighboursOptions, model: BenchModel, data: dict[str, Path], seed: int
) -> dict[str, Any]:
    """The applications, and on all sides but `none` a world that is asked every few seconds."""
    log: list[str] = []
    prompts = (random_prompt(seed + n, options.shape, options.prompt_tokens) for n in itertools.count())
    with ExitStack() as stack:
        world = None
        if side != "none":
            world = SealedWorld(model, options.settings, warm_up=next(prompts), lazy=side == "flexserve")
            stack.callback(world.close)
            stack.enter_context(_policy(side, world, log))
        for path in (*data.values(), model.source.sealed):
            machine.evict(path)
        left = sum(path.stat().st_size for path in data.values()) + round(
            options.model_share * model.weight_bytes
        )
        if world is not None:
            _ask(side, world, next(prompts))
            _give_back(side, world, 0.0)
        hog = stack.enter_context(Hog())
        ours = world.world.status().models[0].resident_bytes if world else 0
        press(hog, 0, left, ours)
        applications = [stack.enter_context(Neighbour(kind, path)) for kind, path in data.items()]
        time.sleep(options.warm_s)
        for one in applications:
            one.rate()
        ttfts, resident = _requests(side, options, world, prompts)
        rates = {one.kind: one.rate() for one in applications}
    return {
        "sqlite_queries_per_s": rates["sqlite"],
        "reader_bytes_per_s": rates["reader"],
        "ttft_s": asdict(Spread.of(ttfts)) if ttfts else None,
        "resident_bytes": round(statistics.mean(resident)) if resident else None,
        "manager": log,
    }


def _requests(
    side: str, options: NeighboursOptions, world: SealedWorld | None, prompts: Iterator[list[int]]
) -> tuple[list[float], list[int]]:
    """Ask every few seconds; the times to the first token, and the weights in memory before each request."""
    begin = time.monotonic()
    ttfts: list[float] = []
    resident: list[int] = []
    for number in range(round(options.measure_s / options.every_s)):
        _sleep_until(begin + number * options.every_s)
        if world is None:
            continue
        resident.append(world.world.status().models[0].resident_bytes)
        ttfts.append(_ask(side, world, next(prompts)))
        _give_back(side, world, options.timer_s)
    _sleep_until(begin + options.measure_s)
    return ttfts, resident


def _ask(side: str, world: SealedWorld, prompt: list[int]) -> float:
    """The time to the first token. What `flexserve` and `always_cache` may hold is no business of the request."""
    return world.ask(prompt, give=side in ("no_cache", "timer")).ttft_s


def _give_back(side: str, world: SealedWorld, timer_s: float) -> None:
    """What the side does after an answer."""
    if side == "timer":
        time.sleep(timer_s)
    if side in ("no_cache", "timer"):
        world.empty()


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))
