"""`flexserve bench ablation`: what each idea brings, one on top of the other (paper, figure 11).

    sequential   load and decrypt everything, then compute
    pipeline     compute while the rest is loaded, in execution order
    prefix       the same with the earliest part of the weights resident
    layout       the same from the device's own copy, which needs no repacking and computes with repacked kernels

The ciphertext is never in the page cache. The steps turn their order from round to round. Knows running worlds.
"""

from __future__ import annotations

import secrets
import statistics
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import EngineFailure, Usage
from ..flexmem.processors import PROCESSORS
from . import cached, machine, processor
from .cold_start import random_prompt
from .files import Progress, Say, prepare_model
from .plain import Job, PlainProcess
from .processor import BUSY_CORES, BUSY_S
from .sides import SealedWorld, Settings
from .stats import Spread

STEPS = ("sequential", "pipeline", "prefix", "layout")


@dataclass(frozen=True)
class AblationOptions:
    """What to measure. `prefix`: the share of the weights that is resident in the last two steps."""

    shape: str = "llama-3.2-1b"
    quant: str = "Q4_0"  # of those that llama.cpp repacks
    prompt_tokens: int = 128
    prefix: float = 0.5
    rounds: int = 3
    directory: Path = Path("bench")
    threads: int = 0  # 0: all cores

    def __post_init__(self) -> None:
        if not 0 < self.prefix < 1:
            raise Usage(
                f"a prefix of {self.prefix} of the weights is none", hint="give a number between 0 and 1"
            )

    @property
    def settings(self) -> Settings:
        return Settings(self.threads or len(PROCESSORS), max(512, 2 * self.prompt_tokens), 2)


def run(options: AblationOptions, say: Say, progress: Progress | None = None) -> dict[str, Any]:
    """Measure; the result is what `--json` prints (docs/schemas/bench-ablation.json).

    Raises `Usage`, `StorageFailure`, and `EngineFailure` when two steps with the same kernels answer differently.
    """
    model = prepare_model(options.directory, options.shape, options.quant, say, progress)
    settings = options.settings
    skipped: dict[str, str] = {}
    warm_up = random_prompt(0, options.shape, options.prompt_tokens)
    with PlainProcess() as process:
        repacked = process.run(
            Job(str(model.gguf), "mmap", True, [0], 1, settings.threads, settings.context_tokens)
        ).repacked_bytes
    with ExitStack() as stack:

        def world(**how: Any) -> SealedWorld:
            return stack.enter_context(closing(SealedWorld(model, settings, warm_up=warm_up, **how)))

        say("starting the secure worlds")
        whole, pipelined = world(on_demand=False), world()
        steps = {
            "sequential": (whole, 0.0),
            "pipeline": (pipelined, 0.0),
            "prefix": (pipelined, options.prefix),
        }
        if repacked:
            steps["layout"] = (world(layout=True), options.prefix)
        else:
            skipped["layout"] = f"llama.cpp repacks nothing of {options.quant} on this processor"
        rounds = [_round(steps, number, options, say) for number in range(options.rounds)]
    first = statistics.median(r["ttft_s"]["sequential"] for r in rounds)
    before = first
    found = {}
    for name in steps:
        spread = Spread.of([r["ttft_s"][name] for r in rounds])
        found[name] = {
            "ttft_s": asdict(spread),
            "vs_sequential": spread.median / first,
            "vs_step_before": spread.median / before,
        }
        before = spread.median
    return {
        "bench": "ablation",
        "machine": machine.describe(),
        "shape": options.shape,
        "quant": options.quant,
        "prompt_tokens": options.prompt_tokens,
        "prefix": options.prefix,
        "threads": settings.threads,
        "weight_bytes": model.weight_bytes,
        "repacked_bytes": repacked,
        "steps": found,
        "skipped": skipped,
        "rounds": rounds,
    }


def _round(
    steps: dict[str, tuple[SealedWorld, float]], number: int, options: AblationOptions, say: Say
) -> dict[str, Any]:
    """Every step once, with the same prompt; all other steps' memory is given back before each."""
    seed = secrets.randbits(32)
    busy = processor.busy_cores(BUSY_S)
    if busy > BUSY_CORES:
        say(f"other programs keep {busy:.1f} cores busy: these times are longer than this machine's")
    say(f"round {number + 1} of {options.rounds}, seed {seed}")
    prompt = random_prompt(seed, options.shape, options.prompt_tokens)
    starts: dict[str, cached.CachedStart] = {}
    names = list(steps)
    for name in names[::-1] if number % 2 else names:
        world, fraction = steps[name]
        starts[name] = cached.start(world, prompt, fraction, in_page_cache=False)
        say(f"  {name:<12}{starts[name].sample.ttft_s:7.3f} s")
        world.empty()
    plain = {one.sample.token_ids for name, one in starts.items() if name != "layout"}
    if len(plain) > 1:
        raise EngineFailure("the steps answered the same prompt differently")
    return {
        "seed": seed,
        "other_busy_cores": busy,
        "ttft_s": {name: starts[name].sample.ttft_s for name in names},
        "resident_bytes": {name: starts[name].resident_bytes for name in names},
        "loaded_bytes": {name: starts[name].sample.read_bytes for name in names},
    }
