"""`flexserve bench cold-start`: a sealed model's cold start against plain llama.cpp's, both in one run.

Random weights in a true shape, uniformly random prompt ids from a new printed seed per round. Before every
measurement of either side free memory is brought into the same state and the file is out of the page cache.

Sides: `plain_*` are new processes on the unencrypted file, the model's load included, as an application
without a server would do it. `sealed_*` is a running world with the model registered and no weight resident;
the time is the client's, from sending the request to its first token.
"""

from __future__ import annotations

import itertools
import os
import secrets
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core import Finished, Request, Sampling, Token
from ..errors import EngineFailure
from ..sealed.keyfile import load_vendor_key, write_key
from ..sealed.keys import DeviceKey, VendorKey
from ..sealed.licence import issue
from ..sealed.reader import SealedModel
from ..sealed.seal import seal
from ..worlds.base import ModelSource
from ..worlds.linux import LinuxWorld
from . import machine
from .generate import write_model
from .machine import MemoryState
from .plain import Job, PlainResult, measure
from .shapes import shape_named

PLAIN_COLD = ("mmap", "read", "direct")
MODEL_SEED = 1
Say = Callable[[str], None]


@dataclass(frozen=True)
class ColdStartOptions:
    """What to measure."""

    shape: str = "llama-3.2-1b"
    quant: str = "Q8_0"
    prompt_tokens: int = 128
    output_tokens: int = 33
    rounds: int = 3
    states: tuple[MemoryState, ...] = (MemoryState.BACKED, MemoryState.IDLE)
    directory: Path = Path("bench")
    threads: int = 0  # 0: all cores

    @property
    def compute_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))

    @property
    def context_tokens(self) -> int:
        return max(512, self.prompt_tokens + self.output_tokens)


@dataclass(frozen=True)
class SealedResult:
    """One answer of the sealed side; seconds as the client saw them, and the loader's own account."""

    ttft_s: float
    decode_tokens_per_s: float
    token_ids: list[int]
    load_bytes: int
    read_s: float
    decrypt_s: float
    place_s: float
    faults: int
    fault_wait_s: float
    prefill_s: float


@dataclass
class Samples:
    """Every result of one memory state, by side, in order of measurement."""

    plain: dict[str, list[PlainResult]] = field(default_factory=dict)
    sealed: dict[str, list[SealedResult]] = field(default_factory=dict)

    def ttft(self, side: str) -> float:
        """Median time to first token."""
        rows = self.plain.get(side) or self.sealed[side]
        return statistics.median(row.ttft_s for row in rows)

    def decode(self, side: str) -> float:
        """Median tokens per second after the first."""
        rows = self.plain.get(side) or self.sealed[side]
        return statistics.median(row.decode_tokens_per_s for row in rows)


@dataclass(frozen=True)
class Files:
    """A model in both forms, and the keys to the sealed one."""

    gguf: Path
    source: ModelSource
    device_key: Path
    vendor_pub: Path


def prepare_files(options: ColdStartOptions, say: Say) -> Files:
    """Generate, seal and license what is missing in the bench directory; what is there is used again."""
    d = options.directory
    d.mkdir(parents=True, exist_ok=True)
    vendor_path, device_path = d / "vendor.key", d / "device.key"
    if not vendor_path.exists():
        write_key(vendor_path, VendorKey.generate())
    if not device_path.exists():
        write_key(device_path, DeviceKey.generate())
    name = f"{options.shape}-{options.quant}"
    gguf, flex, licence = (d / f"{name}.{suffix}" for suffix in ("gguf", "flex", "lic"))
    vendor = load_vendor_key(vendor_path)
    if not gguf.exists():
        say(f"generating {gguf} with random weights")
        write_model(shape_named(options.shape), options.quant, gguf, seed=MODEL_SEED)
    if not flex.exists():
        say(f"sealing {flex}")
        seal(gguf, flex, vendor, model_id=name, version=1)
    from ..sealed.keyfile import load_device_key

    with flex.open("rb") as file:
        sealed = SealedModel.open(file.fileno(), [vendor.public])
        now = int(time.time())
        licence.write_bytes(
            issue(sealed, vendor, load_device_key(device_path).public, issued_at=now, serial=time.time_ns())
        )
    return Files(gguf, ModelSource("bench", flex, licence), device_path, vendor_path.with_suffix(".pub"))


class _Sealed:
    """A running world with the bench model registered."""

    def __init__(self, files: Files, options: ColdStartOptions, *, on_demand: bool = True) -> None:
        self._files, self._options = files, options
        self.world = LinuxWorld(
            str(files.device_key),
            vendor_pub=files.vendor_pub,
            threads=options.compute_threads,
            context_tokens=options.context_tokens,
            on_demand=on_demand,
        )
        self.world.start()
        start = time.perf_counter()
        self.world.register(files.source)
        self.register_s = time.perf_counter() - start
        self._numbers = itertools.count()

    def vocabulary(self) -> int:
        return shape_named(self._options.shape).vocabulary

    def empty(self) -> None:
        """No weight resident, no ciphertext in the page cache."""
        self.world.recall(1 << 60)
        if self.world.status().models[0].resident_bytes:
            raise EngineFailure("weights stay resident after a recall")
        machine.evict(self._files.source.sealed)

    def ask(self, token_ids: list[int]) -> SealedResult:
        """Answer once, timed at the client."""
        request = Request(
            id=f"bench-{next(self._numbers)}",
            model="bench",
            token_ids=tuple(token_ids),
            max_tokens=self._options.output_tokens,
            ignore_eos=True,
            sampling=Sampling(temperature=0),
        )
        start = time.perf_counter()
        first = 0.0
        for event in self.world.generate(request):
            if isinstance(event, Token):
                first = first or time.perf_counter()
                continue
            assert isinstance(event, Finished)
            t = event.timings
            return SealedResult(
                first - start,
                t.decode_tokens_per_s,
                list(event.token_ids),
                t.load_bytes,
                t.read_s,
                t.decrypt_s,
                t.place_s,
                t.faults,
                t.fault_wait_s,
                t.prefill_s,
            )
        raise EngineFailure("the answer did not end")

    def peak_bytes(self) -> int:
        assert self.world.pid is not None
        return machine.peak_resident_bytes(self.world.pid)


def run(options: ColdStartOptions, say: Say) -> dict[str, Any]:
    """Measure; the result is what `--json` prints (docs/schemas/bench-cold-start.json)."""
    files = prepare_files(options, say)
    seeds: list[int] = []
    samples = {state: Samples() for state in options.states}
    pipelined = _Sealed(files, options)
    sequential = _Sealed(files, options, on_demand=False)
    register_resident = pipelined.world.status().models[0].resident_bytes
    try:
        for state, number in itertools.product(options.states, range(options.rounds)):
            seed = secrets.randbits(32)
            seeds.append(seed)
            say(f"{state}, round {number + 1} of {options.rounds}, seed {seed}")
            ids = np.random.default_rng(seed).integers(0, pipelined.vocabulary(), options.prompt_tokens)
            _round(samples[state], state, number, ids.tolist(), files, options, (pipelined, sequential), say)
        peak = pipelined.peak_bytes()
    finally:
        pipelined.world.close()
        sequential.world.close()
    _check_tokens(samples.values())
    return {
        "bench": "cold-start",
        "machine": machine.describe(),
        "shape": options.shape,
        "quant": options.quant,
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "threads": options.compute_threads,
        "rounds": options.rounds,
        "seeds": seeds,
        "weight_bytes": files.gguf.stat().st_size,
        "register_s": pipelined.register_s,
        "register_resident_bytes": register_resident,
        "sealed_peak_bytes": peak,
        "states": {str(state): _report(samples[state]) for state in options.states},
    }


def _round(  # noqa: PLR0917
    samples: Samples,
    state: MemoryState,
    number: int,
    ids: list[int],
    files: Files,
    options: ColdStartOptions,
    sealed: tuple[_Sealed, _Sealed],
    say: Say,
) -> None:
    """Each side once from cold, in an order that turns from round to round; then each warm."""
    pipelined, sequential = sealed

    def plain(mode: str) -> PlainResult:
        return measure(
            Job(
                str(files.gguf),
                mode,
                True,
                ids,
                options.output_tokens,
                options.compute_threads,
                options.context_tokens,
            )
        )

    def cold_plain(mode: str) -> None:
        machine.evict(files.gguf)
        machine.prepare(state)
        machine.evict(files.gguf)
        result = plain(mode)
        samples.plain.setdefault(f"plain_cold_{mode}", []).append(result)
        say(f"  plain_cold_{mode:<12}{result.ttft_s:7.3f} s")

    def cold_sealed(name: str, side: _Sealed) -> None:
        side.empty()
        machine.prepare(state)
        side.empty()
        result = side.ask(ids)
        samples.sealed.setdefault(name, []).append(result)
        say(f"  {name:<23}{result.ttft_s:7.3f} s")

    steps: list[Callable[[], None]] = [
        *(lambda mode=mode: cold_plain(mode) for mode in PLAIN_COLD),
        lambda: cold_sealed("sealed_cold", pipelined),
        lambda: cold_sealed("sealed_sequential", sequential),
    ]
    turn = number % len(steps)
    for step in steps[turn:] + steps[:turn]:
        step()
    sequential.world.recall(1 << 60)
    machine.warm(files.gguf)
    samples.plain.setdefault("plain_warm", []).append(plain("mmap"))
    pipelined.ask(ids)
    samples.sealed.setdefault("sealed_resident", []).append(pipelined.ask(ids))
    warm, resident = samples.plain["plain_warm"][-1], samples.sealed["sealed_resident"][-1]
    say(f"  plain_warm             {warm.ttft_s:7.3f} s  {warm.decode_tokens_per_s:5.1f} tokens/s")
    say(f"  sealed_resident        {resident.ttft_s:7.3f} s  {resident.decode_tokens_per_s:5.1f} tokens/s")


def _check_tokens(all_samples: Iterable[Samples]) -> None:
    """Both sides must have answered the same, or their times mean nothing."""
    for samples in all_samples:
        sides: list[list[list[int]]] = [[r.token_ids for r in rows] for rows in samples.plain.values()]
        sides += [[r.token_ids for r in rows] for rows in samples.sealed.values()]
        for answers in zip(*sides, strict=True):
            if any(answer != answers[0] for answer in answers):
                raise EngineFailure("plain and sealed answers differ")


def _report(s: Samples) -> dict[str, Any]:
    best = min((f"plain_cold_{mode}" for mode in PLAIN_COLD), key=s.ttft)
    cold = s.ttft("sealed_cold")
    resident_plain = statistics.median(r.resident_ttft_s for r in s.plain["plain_warm"])
    return {
        "ratios": {
            "cold_vs_plain_cold": cold / s.ttft(best),
            "cold_vs_plain_process_warm": cold / s.ttft("plain_warm"),
            "cold_vs_resident": cold / s.ttft("sealed_resident"),
            "pipelined_vs_sequential": cold / s.ttft("sealed_sequential"),
            "decode_vs_plain": s.decode("sealed_resident") / s.decode("plain_warm"),
            "prefill_vs_plain": resident_plain / s.ttft("sealed_resident"),
        },
        "best_plain_cold": best,
        "median_ttft_s": {side: s.ttft(side) for side in (*s.plain, *s.sealed)},
        "median_decode_tokens_per_s": {side: s.decode(side) for side in ("plain_warm", "sealed_resident")},
        "ttft_s": {side: [r.ttft_s for r in rows] for side, rows in s.plain.items()}
        | {side: [r.ttft_s for r in rows] for side, rows in s.sealed.items()},
        "sealed_cold": [
            {
                "load_bytes": r.load_bytes,
                "read_s": r.read_s,
                "decrypt_s": r.decrypt_s,
                "place_s": r.place_s,
                "faults": r.faults,
                "fault_wait_s": r.fault_wait_s,
                "prefill_s": r.prefill_s,
            }
            for r in s.sealed["sealed_cold"]
        ],
        "plain_peak_bytes": max(r.peak_bytes for rows in s.plain.values() for r in rows),
    }
