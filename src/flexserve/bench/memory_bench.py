"""`flexserve bench memory`: what it costs to give memory back and to get it again.

Random weights in a true shape, random prompt ids from a printed seed, greedy. Parts can be measured alone:

    decision  what the Framework takes to decide, with 20 models of scattered segments (decisions.py)
    recall    recalls of 128 MiB, 1 GiB and all, idle and during an answer (recalls.py)
    refill    bringing weights back from the page cache, by processor time (cached.py)
    lazy      handing memory to the kernel (lazy.py)
    cached    time to the first token with 0 to 100 % of the weights resident (cached.py)
    session   saving and restoring a conversation against computing it (session.py)
    pressure  time to the first token while another process holds memory (background.py)

Knows the order of the parts and what they come to.
"""

from __future__ import annotations

import secrets
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import Usage
from ..flexmem.processors import PROCESSORS
from . import background, cached, decisions, lazy, machine, processor, recalls, session
from .cold_start import random_prompt
from .files import BenchModel, Progress, Say, prepare_model
from .memory import MemoryState, free_memory
from .processor import BUSY_CORES, BUSY_S
from .sides import SealedWorld, Settings
from .stats import Spread

PARTS = ("decision", "recall", "refill", "lazy", "cached", "session", "pressure")
USUAL_PARTS = PARTS[:-1]  # pressure takes nearly all memory of the machine: only if asked for
SOURCES = ("page_cache", "storage")  # where the ciphertext of the absent part is
SMALLEST_CONTEXT = 2048
REFILL_SPARE_BYTES = 256 << 20  # what a refill takes beside the weights


@dataclass(frozen=True)
class MemoryOptions:
    """What to measure."""

    shape: str = "llama-3.2-1b"
    quant: str = "Q8_0"
    prompt_tokens: int = 128
    session_tokens: int = 1024
    rounds: int = 3
    parts: tuple[str, ...] = USUAL_PARTS
    directory: Path = Path("bench")
    threads: int = 0  # 0: all cores

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise Usage(
                f"no part is called {unknown[0]!r}" if unknown else "no part is to be measured",
                hint=f"there are {', '.join(PARTS)}",
            )

    @property
    def settings(self) -> Settings:
        threads = self.threads or len(PROCESSORS)
        return Settings(threads, max(SMALLEST_CONTEXT, 2 * self.prompt_tokens), 2)


def run(options: MemoryOptions, say: Say, progress: Progress | None = None) -> dict[str, Any]:
    """Measure; the result is what `--json` prints (docs/schemas/bench-memory.json).

    Raises `Usage`, `StorageFailure`, `EngineFailure`.
    """
    model = prepare_model(options.directory, options.shape, options.quant, say, progress)
    bench = _Bench(options, model, say)
    found: dict[str, Any] = dict.fromkeys(PARTS)
    busy: dict[str, float] = {}
    for part in PARTS:
        if part in options.parts:
            busy[part] = processor.busy_cores(BUSY_S)
            if busy[part] > BUSY_CORES:
                say(f"other programs keep {busy[part]:.1f} cores busy: times of {part} are too long")
            found[part] = getattr(bench, part)()
    return {
        "bench": "memory",
        "machine": machine.describe(),
        "shape": options.shape,
        "quant": options.quant,
        "prompt_tokens": options.prompt_tokens,
        "threads": options.settings.threads,
        "rounds": options.rounds,
        "weight_bytes": model.weight_bytes,
        "seed": bench.seed,
        "other_busy_cores": busy,
        **headline(found),
        **found,
    }


def headline(found: dict[str, Any]) -> dict[str, float | None]:
    """The numbers that are promised; None for those whose part was not measured."""
    rows = found["recall"] or []
    of = {(row["asked"], row["during"]): row for row in rows}
    whole, small = of.get(("all", "idle")), of.get(("128 MiB", "idle"))
    return {
        "decision_ms": _longest(found["decision"]),
        "recall_gbps": whole and whole["gbps"]["median"],
        "recall_first_byte_ms": small and small["first_byte_ms"]["median"],
        "async_return_ms_128mib": small and small["async_ms"]["median"],
        "refill_gbps_per_core": found["refill"] and found["refill"]["gbps_per_core"]["median"],
        "lazy_gbps": found["lazy"] and found["lazy"]["gbps"]["median"],
        "ttft_half_cached_vs_resident": _vs_resident(found["cached"], 0.5),
        "ttft_three_quarters_cached_vs_resident": _vs_resident(found["cached"], 0.75),
        "session_restore_vs_recompute": found["session"] and found["session"]["restore_vs_recompute"],
    }


def _longest(rows: Sequence[dict[str, Any]] | None) -> float | None:
    """Of the decisions about as many segments as the promise is for."""
    return (
        max((row["ms"] for row in rows if row["segments"] == decisions.SEGMENTS[0]), default=None)
        if rows
        else None
    )


def _vs_resident(rows: Sequence[dict[str, Any]] | None, fraction: float) -> float | None:
    """From the page cache, as refilling is promised."""
    for row in rows or ():
        if row["fraction"] == fraction and row["source"] == "page_cache":
            value: float | None = row["vs_resident"]
            return value
    return None


class _Bench:
    """One method for each part; the name is the part's."""

    def __init__(self, options: MemoryOptions, model: BenchModel, say: Say) -> None:
        self.seed = secrets.randbits(32)
        self._options, self._model, self._say = options, model, say
        self._prompt = random_prompt(self.seed, options.shape, options.prompt_tokens)
        say(f"seed {self.seed}")

    @contextmanager
    def _world(self, session_dir: Path | None = None, *, lazy: bool = False) -> Iterator[SealedWorld]:
        world = SealedWorld(
            self._model, self._options.settings, warm_up=self._prompt, session_dir=session_dir, lazy=lazy
        )
        try:
            yield world
        finally:
            world.close()

    def _rounds(self) -> range:
        return range(self._options.rounds)

    def decision(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [
            {
                "event": one.event,
                "segments": one.segments,
                "stretches": one.stretches,
                "ms": one.seconds * 1e3,
            }
            for one in decisions.measure()
        ]
        longest = max(rows, key=lambda row: row["ms"])
        self._say(
            f"longest decision {longest['ms']:.2f} ms: {longest['event']}, {longest['segments']} segments"
        )
        return rows

    def recall(self) -> list[dict[str, Any]]:
        rows = []
        kinds: dict[str, Callable[[SealedWorld, list[int], int], recalls.RecallTimes]] = {
            "idle": recalls.idle,
            "generating": recalls.generating,
        }
        with tempfile.TemporaryDirectory(dir=self._model.gguf.parent) as directory:
            Path(directory).chmod(0o700)
            with self._world(Path(directory)) as world:
                for during, measure in kinds.items():
                    for asked, nbytes in recalls.SIZES.items():
                        if asked != "all" and nbytes > self._model.weight_bytes:
                            continue
                        times = [measure(world, self._prompt, nbytes) for _ in self._rounds()]
                        rows.append(recall_row(asked, during, times))
                        self._say(_recall_line(rows[-1]))
        return rows

    def refill(self) -> dict[str, Any]:
        with self._world() as world:
            free = free_memory(MemoryState.BACKED, self._model.weight_bytes + REFILL_SPARE_BYTES)
            try:
                found = [cached.refill(world, self._prompt[:1], free) for _ in self._rounds()]
            finally:
                free.close()
        rates = [one.bytes_per_s / 1e9 for one in found]
        touches = [one.first_touch_s_per_gb for one in found]
        self._say(
            f"refill {statistics.median(rates):.2f} GB/s of one core, into memory whose first touch costs "
            f"{statistics.median(touches):.2f} s/GB"
        )
        return {"gbps_per_core": _spread(rates), "first_touch_s_per_gb": _spread(touches)}

    def lazy(self) -> dict[str, Any]:
        rates = [lazy.hand_over_bytes_per_s() / 1e9 for _ in self._rounds()]
        self._say(f"lazy hand-over {statistics.median(rates):.1f} GB/s")
        return {"gbps": _spread(rates)}

    def cached(self) -> list[dict[str, Any]]:
        starts: dict[tuple[str, float], list[cached.CachedStart]] = {}
        with self._world() as world:
            for number in self._rounds():
                order = [(source, fraction) for source in SOURCES for fraction in cached.FRACTIONS]
                for source, fraction in order[::-1] if number % 2 else order:
                    one = cached.start(world, self._prompt, fraction, in_page_cache=source == "page_cache")
                    starts.setdefault((source, fraction), []).append(one)
        rows = cached_rows(starts)
        for row in rows:
            self._say(
                f"  {100 * row['fraction']:3.0f} % resident, rest from {row['source']:<10}"
                f"{row['ttft_s']['median']:7.3f} s, {row['vs_resident']:.2f} of resident"
            )
        return rows

    def session(self) -> dict[str, Any]:
        o = self._options
        times = session.measure(
            self._model.gguf, self._model.gguf.parent, threads=o.settings.threads, tokens=o.session_tokens
        )
        self._say(
            f"restoring {times.tokens} tokens: {times.session_restore_vs_recompute:.4f} of computing them"
        )
        return {**asdict(times), "restore_vs_recompute": times.session_restore_vs_recompute}

    def pressure(self) -> dict[str, Any]:
        log: list[str] = []
        with self._world(lazy=True) as world:
            handed = background.lazily(world, self._prompt)
            starts = background.levels(world, self._prompt, log)
        for one in starts:
            self._say(f"  {one.left_bytes >> 20:6} MiB left  {one.side:<16}{one.ttft_s:7.3f} s")
        rows = [asdict(one) for one in starts]
        for row in rows:
            del row["token_ids"]
        return {"lazy": asdict(handed), "starts": rows, "manager": log}


def recall_row(asked: str, during: str, times: Sequence[recalls.RecallTimes]) -> dict[str, Any]:
    """A row of table 1, in milliseconds; None where it does not apply."""

    def spread(pick: Callable[[recalls.RecallTimes], float | None]) -> dict[str, Any] | None:
        values = [value for one in times if (value := pick(one)) is not None]
        return _spread([1000 * value for value in values]) if values else None

    return {
        "asked": asked,
        "during": during,
        "freed_bytes": min(one.freed_bytes for one in times),
        "later_bytes": max(one.later_bytes for one in times),
        "async_ms": spread(lambda t: t.async_s),
        "first_byte_ms": spread(lambda t: t.first_byte_s),
        "two_stage_ms": spread(lambda t: t.two_stage_s),
        "sync_ms": spread(lambda t: t.sync_s),
        "gbps": _spread([one.freed_bytes / one.two_stage_s / 1e9 for one in times]),
        "usual_gap_ms": spread(lambda t: t.usual_gap_s),
        "longest_gap_ms": spread(lambda t: t.longest_gap_s),
    }


def _recall_line(row: dict[str, Any]) -> str:
    return (
        f"  {row['asked']:>8} {row['during']:<11} returns after {row['async_ms']['median']:.2f} ms, all back after "
        f"{row['two_stage_ms']['median']:.1f} ms, {row['gbps']['median']:.1f} GB/s"
    )


def cached_rows(starts: dict[tuple[str, float], list[cached.CachedStart]]) -> list[dict[str, Any]]:
    """By source and fraction; each against the same source's with everything resident."""
    median = {key: statistics.median(one.sample.ttft_s for one in ones) for key, ones in starts.items()}
    return [
        {
            "source": source,
            "fraction": fraction,
            "resident_bytes": min(one.resident_bytes for one in ones),
            "loaded_bytes": max(one.sample.read_bytes for one in ones),
            "ttft_s": _spread([one.sample.ttft_s for one in ones]),
            "vs_resident": median[source, fraction] / median[source, 1.0],
        }
        for (source, fraction), ones in starts.items()
    ]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return asdict(Spread.of(values))
