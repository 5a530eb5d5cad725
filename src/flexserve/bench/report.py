"""What a run of the cold-start bench comes to: medians, spreads, ratios, the lower bound. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .bound import Bound, Rates, Work, lower_bound
from .memory import Condition, MemoryState
from .rates import Placing
from .sides import Sample
from .stats import Ratio, Series, Spread

Pick = Callable[[Sample], float | None]


@dataclass(frozen=True)
class Measured:
    """One answer and the circumstances of it."""

    sample: Sample
    condition: Condition
    gap_s: float  # from freeing memory to the clock's start
    steal_s: float  # of all cores, from there to the end of the answer
    reported_bytes: int | None  # handed back to the host meanwhile


@dataclass(frozen=True)
class Round:
    """Every side once, with the same prompt ids."""

    seed: int
    read_bytes_per_s: float  # of the storage, just before
    other_busy_cores: float  # used by other programs, just before
    measured: Mapping[str, Measured]


@dataclass(frozen=True)
class Run:
    """Everything that was measured."""

    machine: dict[str, str | int]
    shape: str
    quant: str
    prompt_tokens: int
    long_prompt_tokens: int | None
    output_tokens: int
    threads: int
    weight_bytes: int
    disk_bytes: int
    repacked_bytes: int
    decrypt_bytes_per_s: float
    placing: Placing
    register_s: float | None
    register_resident_bytes: int | None
    skipped: Mapping[str, str]
    rounds: Mapping[MemoryState, list[Round]]


def report(run: Run) -> dict[str, Any]:
    """The object of `--json`."""
    states = {state: _State(run, rounds) for state, rounds in run.rounds.items()}
    headline = MemoryState.BACKED if MemoryState.BACKED in states else MemoryState.IDLE
    plain = ("machine", "shape", "quant", "prompt_tokens", "long_prompt_tokens", "output_tokens", "threads")
    sizes = ("weight_bytes", "disk_bytes", "repacked_bytes", "register_s", "register_resident_bytes")
    return {
        "bench": "cold-start",
        **{name: getattr(run, name) for name in (*plain, *sizes)},
        "headline_state": str(headline),
        "ratios": states[headline].ratios(),
        "ratios_idle": states[MemoryState.IDLE].ratios() if MemoryState.IDLE in states else None,
        "rates": {
            "decrypt_bytes_per_s": run.decrypt_bytes_per_s,
            "place_bytes_per_s": run.placing.bytes_per_s,
            **asdict(run.placing),
        },
        "skipped": dict(run.skipped),
        "states": {str(state): part.as_dict() for state, part in states.items()},
    }


class _State:
    """The rounds of one memory state."""

    def __init__(self, run: Run, rounds: list[Round]) -> None:
        self._run, self._rounds = run, rounds
        self.sides = list(rounds[0].measured)
        self.bounds: dict[str, list[Bound]] = {
            side: [self._bound(r, side) for r in rounds]
            for side in ("sealed_cold", "sealed_cold_long", "sealed_cold_layout")
            if side in self.sides and _resident(side) in self.sides
        }

    def _bound(self, r: Round, side: str) -> Bound:
        cold = r.measured[side]
        # The best of all rounds: disturbed by somebody else's work it would be no lower bound.
        resident = [other.measured[_resident(side)].sample for other in self._rounds]
        placing = self._run.placing
        extra = cold.condition.first_touch_s_per_gb - placing.first_touch_huge_s_per_gb
        return lower_bound(
            Work(cold.sample.read_bytes, min(s.ttft_s for s in resident), min(s.cpu_s for s in resident)),
            Rates(
                cores=int(self._run.machine["cores"]),
                read_bytes_per_s=r.read_bytes_per_s,
                decrypt_bytes_per_s=self._run.decrypt_bytes_per_s,
                place_bytes_per_s=placing.bytes_per_s,
                first_touch_extra_s_per_byte=max(0.0, extra) / 1e9,
            ),
        )

    def series(self, side: str, quantity: str, pick: Pick) -> Series | None:
        """One value per round; None when the side was not measured or cannot tell."""
        if side not in self.sides:
            return None
        values = [pick(r.measured[side].sample) for r in self._rounds]
        known = tuple(v for v in values if v is not None)
        return Series(side, quantity, known) if len(known) == len(values) else None

    def _ttft(self, side: str) -> Series | None:
        return self.series(side, "ttft_s", lambda s: s.ttft_s)

    def _best(self, prefix: str) -> Series | None:
        """Plain llama.cpp's fastest way, by median."""
        found = [self._ttft(side) for side in self.sides if side.startswith(prefix)]
        return min((s for s in found if s is not None), key=lambda s: s.median, default=None)

    def _speed(self, side: str, quantity: str) -> Series | None:
        """Tokens per second with everything in memory: of the prompt, or after its first token."""
        if quantity == "decode_tokens_per_s":
            return self.series(side, quantity, lambda s: s.decode_tokens_per_s)
        tokens = self._run.prompt_tokens

        def prefill(sample: Sample) -> float | None:
            # A plain process's TTFT has the load in it, so it answers a second time.
            seconds = sample.resident_ttft_s if side.startswith("plain") else sample.ttft_s
            return None if seconds is None else tokens / seconds

        return self.series(side, quantity, prefill)

    def ratios(self) -> dict[str, dict[str, object]]:
        """Those of which both sides were measured."""
        # What llama.cpp does when left alone: it repacks where it can.
        default = "plain_warm_repack" if self._run.repacked_bytes else "plain_warm"
        found: dict[str, tuple[Series | None, Series | None]] = {}
        for prefix, cold in (("", "sealed_cold"), ("layout_", "sealed_cold_layout")):
            resident, ttft = _resident(cold), self._ttft(cold)
            found |= {
                f"{prefix}cold_vs_plain_cold": (ttft, self._best("plain_cold")),
                f"{prefix}cold_vs_plain_process_warm": (ttft, self._best("plain_warm")),
                f"{prefix}cold_vs_resident": (ttft, self._ttft(resident)),
                f"{prefix}cold_vs_lower_bound": (ttft, self._lower_bound(cold)),
            }
            for stage in ("decode", "prefill"):
                both = (self._speed(side, f"{stage}_tokens_per_s") for side in (resident, default))
                found[f"{prefix}{stage}_vs_plain"] = (next(both), next(both))
        found["hardening_cold"] = (self._ttft("sealed_cold"), self._ttft("unhardened_cold"))
        decode = "decode_tokens_per_s"
        found["hardening_decode"] = (
            self._speed("sealed_resident", decode),
            self._speed("unhardened_resident", decode),
        )
        long = "sealed_cold_long"
        found["pipelined_vs_sequential"] = (self._ttft("sealed_cold"), self._ttft("sealed_sequential"))
        found["long_cold_vs_resident"] = (self._ttft(long), self._ttft(_resident(long)))
        found["long_cold_vs_lower_bound"] = (self._ttft(long), self._lower_bound(long))
        return {
            name: Ratio(above, below).as_dict()
            for name, (above, below) in found.items()
            if above is not None and below is not None and min(below.values) > 0
        }

    def _lower_bound(self, side: str) -> Series | None:
        bounds = self.bounds.get(side)
        return Series(side, "lower_bound_s", tuple(b.lower_bound_s for b in bounds)) if bounds else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "rounds": [
                {
                    "seed": r.seed,
                    "read_bytes_per_s": r.read_bytes_per_s,
                    "other_busy_cores": r.other_busy_cores,
                    "order": list(r.measured),
                    "lower_bound": {side: bounds[n].as_dict() for side, bounds in self.bounds.items()},
                }
                for n, r in enumerate(self._rounds)
            ],
            "sides": {side: self._side(side) for side in self.sides},
        }

    def _side(self, side: str) -> dict[str, Any]:
        rows = [r.measured[side] for r in self._rounds]
        summed = ("ttft_s", "decode_tokens_per_s", "cpu_s", "peak_bytes")
        return {
            **{name: asdict(Spread.of([getattr(row.sample, name) for row in rows])) for name in summed},
            "samples": [_sample(row) for row in rows],
        }


def _resident(cold: str) -> str:
    return cold.replace("cold", "resident")


def _sample(row: Measured) -> dict[str, Any]:
    values = asdict(row.sample)
    del values["token_ids"]
    circumstances = ("gap_s", "steal_s", "reported_bytes")
    return values | asdict(row.condition) | {name: getattr(row, name) for name in circumstances}
