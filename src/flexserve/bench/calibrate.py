"""`flexserve bench calibrate`: what this machine's parts do, and the shortest cold start they allow.

Every rate is of one part alone, with nothing else running. The model that compute is measured on is two layers
of the 1B shape; reading uses its file. Under a minute after the first time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core import ROW_UNIT_SIZE, SEGMENT_SIZE
from ..flexmem.processors import PROCESSORS
from ..worlds.linux import calibration
from ..worlds.linux.rates import decrypt_bytes_per_s, read_bytes_per_s
from . import machine, memory, processor, rates
from .bound import Rates, Work, lower_bound
from .files import BenchModel, Progress, Say, prepare_model
from .plain import Job, PlainProcess
from .processor import BUSY_CORES, BUSY_S
from .shapes import shape_named

SHAPE, QUANT = "calibration", "Q8_0"
EXAMPLE_SHAPE, EXAMPLE_TOKENS = "llama-3.2-1b", 128
OUTPUT_TOKENS = 33
COMPUTE_RUNS = 3  # the best counts: what the machine can do


@dataclass(frozen=True)
class Compute:
    """What llama.cpp does with weights that are resident, all cores together."""

    prefill_flops_per_s: float  # two operations per weight and token
    decode_bytes_per_s: float  # of weights, each token reads all of them once


def calibrate(directory: Path, say: Say, progress: Progress | None = None) -> dict[str, Any]:
    """Measure; the result is what `--json` prints (docs/schemas/bench-calibrate.json).

    Raises `StorageFailure`, `EngineFailure`.
    """
    cores = len(PROCESSORS)
    busy = processor.busy_cores(BUSY_S)
    if busy > BUSY_CORES:
        say(f"other programs keep {busy:.1f} cores busy: these rates are lower than this machine's")
    as_found = memory.first_touch_s_per_gb(rates.PLACE_BYTES, huge=True)
    model = prepare_model(directory, SHAPE, QUANT, say, progress)
    machine.evict(model.gguf)
    say("reading")
    direct = {depth: read_bytes_per_s(model.gguf, rates.READ_BYTES, depth=depth) for depth in rates.DEPTHS}
    small = read_bytes_per_s(model.gguf, rates.READ_BYTES, depth=4, huge=False)
    cached = rates.cached_bytes_per_s(model.gguf)
    say("decrypting")
    decrypt = {
        "decrypt_bytes_per_s": decrypt_bytes_per_s(rates.DECRYPT_S),
        "decrypt_all_cores_bytes_per_s": decrypt_bytes_per_s(rates.DECRYPT_S, threads=cores),
        "decrypt_row_units_bytes_per_s": decrypt_bytes_per_s(rates.DECRYPT_S, unit=ROW_UNIT_SIZE),
    }
    say("placing")
    placing = rates.placing()
    say("computing")
    compute = _compute(model, cores)
    machine_rates = Rates(cores, max(direct.values()), decrypt["decrypt_bytes_per_s"], placing.bytes_per_s)
    return {
        "bench": "calibrate",
        "machine": machine.describe(),
        "other_busy_cores": busy,
        "segment_bytes": SEGMENT_SIZE,
        "read_direct_bytes_per_s": {str(depth): rate for depth, rate in direct.items()},
        "read_direct_small_pages_bytes_per_s": small,
        "read_cached_bytes_per_s": cached,
        **decrypt,
        "place_bytes_per_s": placing.bytes_per_s,
        **asdict(placing),
        "first_touch_as_found_s_per_gb": as_found,
        **asdict(compute),
        "tuning": tuning(model.gguf, say),
        "example": _example(machine_rates, compute),
    }


def tuning(file: Path, say: Say) -> dict[str, int]:
    """The numbers of threads that a server would choose; stored, as at a first start."""
    found = calibration.measure(file)
    calibration.store(found)
    say(calibration.describe(found.rates))
    return asdict(calibration.choose(found.rates))


def _compute(model: BenchModel, threads: int) -> Compute:
    shape = shape_named(SHAPE)
    ids = np.random.default_rng(1).integers(0, shape.vocabulary, EXAMPLE_TOKENS)
    machine.warm(model.gguf)
    job = Job(str(model.gguf), "mmap", True, [int(i) for i in ids], OUTPUT_TOKENS, threads, 512, again=True)
    prefill_s, decode = [], []
    for _ in range(COMPUTE_RUNS):
        with PlainProcess() as process:
            got = process.run(job)
        prefill_s += [got.prefill_s if got.resident_ttft_s is None else got.resident_ttft_s]
        decode += [got.decode_tokens_per_s]
    # The output matrix works on the last token only.
    operations = 2 * (shape.layer_parameters * EXAMPLE_TOKENS + shape.output_parameters)
    return Compute(operations / min(prefill_s), max(decode) * model.weight_bytes)


def _example(machine_rates: Rates, compute: Compute) -> dict[str, Any]:
    """The lower bound of the shape most promises are about."""
    shape = shape_named(EXAMPLE_SHAPE)
    operations = 2 * (shape.layer_parameters * EXAMPLE_TOKENS + shape.output_parameters)
    compute_s = operations / compute.prefill_flops_per_s
    load_bytes = shape.parameters * 34 // 32  # Q8_0: a scale of two bytes for 32 weights
    bound = lower_bound(Work(load_bytes, compute_s, compute_s * machine_rates.cores), machine_rates)
    return {
        "shape": EXAMPLE_SHAPE,
        "quant": QUANT,
        "prompt_tokens": EXAMPLE_TOKENS,
        "load_bytes": load_bytes,
        **bound.as_dict(),
    }
