"""`flexserve bench`: measurements that show what the documentation promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import Usage
from . import bench_memory, bench_workflows
from .bench_options import DIRECTORY, JSON, PROMPT_TOKENS, QUANT, SHAPE, THREADS, measure, names, require_plot
from .common import Whole, human_bytes, sigterm_interrupts
from .display import note, table


@click.group("bench")
def command() -> None:
    """Measure FlexServe against plain llama.cpp on this machine, both sides in one run."""


@command.command("cold-start")
@SHAPE
@QUANT
@PROMPT_TOKENS
@click.option("--rounds", type=Whole(1, 100), default=3, show_default=True, help="Rounds per memory state.")
@click.option(
    "--states",
    callback=names,
    default="backed,idle",
    show_default=True,
    help="The states of free memory before each start.",
)
@click.option(
    "--sides", callback=names, metavar="A,B", help="Measure only these. [default: all but unhardened_*]"
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw a timeline of one more cold start into this .png, .svg or .pdf file (needs matplotlib).",
)
@THREADS
@DIRECTORY
@JSON
def cold_start(
    *, states: tuple[str, ...], sides: tuple[str, ...], plot: Path | None, as_json: bool, **given: Any
) -> None:
    """Time to first token from cold: sealed against plain llama.cpp.

    Takes about two minutes a round at the default shape, and free memory of twice the model and 1 GB: every start
    of every side is prepared alike (docs/benchmarks.md).
    """
    from ..bench.cold_start import USUAL_SIDES, ColdStartOptions, draw_one, run
    from ..bench.memory import MemoryState

    unknown = [state for state in states if state not in tuple(MemoryState)]
    if unknown:
        raise Usage(f"no memory state is called {unknown[0]!r}", hint=f"there are {', '.join(MemoryState)}")
    options = ColdStartOptions(
        states=tuple(MemoryState(s) for s in dict.fromkeys(states)), sides=sides or USUAL_SIDES, **given
    )
    require_plot(plot)
    measure(run, options, _cold_start, as_json=as_json)
    if plot is not None:
        with sigterm_interrupts():
            draw_one(options, plot, note)


def _cold_start(result: dict[str, Any]) -> str:
    parts = [
        f"\n{state} memory, medians of {len(part['rounds'])} rounds\n{_side_table(part['sides'])}"
        for state, part in result["states"].items()
    ]
    parts += [
        f"\n{state} memory\n{_ratio_table(result[key])}"
        for key, state in (("ratios", result["headline_state"]), ("ratios_idle", "idle"))
        if result[key] and (key == "ratios" or result["headline_state"] != "idle")
    ]
    return "\n".join(parts)


@command.command("calibrate")
@DIRECTORY
@JSON
def calibrate(*, directory: Path, as_json: bool) -> None:
    """What this machine reads, decrypts, places and computes, each alone.

    Takes less than a minute; do nothing else meanwhile.
    """
    from ..bench.calibrate import calibrate

    measure(calibrate, directory, _calibrate, as_json=as_json)


def _calibrate(result: dict[str, Any]) -> str:
    rows = [
        (f"read, {depth} in flight", _rate(rate)) for depth, rate in result["read_direct_bytes_per_s"].items()
    ]
    rows += [
        ("read, 4 in flight, into small pages", _rate(result["read_direct_small_pages_bytes_per_s"])),
        ("read from the page cache", _rate(result["read_cached_bytes_per_s"])),
        ("decrypt, one core", _rate(result["decrypt_bytes_per_s"])),
        ("decrypt, all cores", _rate(result["decrypt_all_cores_bytes_per_s"])),
        ("decrypt, 16 KiB units, one core", _rate(result["decrypt_row_units_bytes_per_s"])),
        ("place by copying", _cost(result["copy_s_per_gb"])),
        ("place by moving huge pages", _cost(result["move_s_per_gb"])),
        ("first touch, huge pages", _cost(result["first_touch_huge_s_per_gb"])),
        ("first touch, small pages", _cost(result["first_touch_small_s_per_gb"])),
        ("first touch, memory as it was found", _cost(result["first_touch_as_found_s_per_gb"])),
        ("prefill, all cores", f"{result['prefill_flops_per_s'] / 1e9:.0f} Gflop/s"),
        ("decode, all cores", _rate(result["decode_bytes_per_s"])),
    ]
    tuning, example = result["tuning"], result["example"]
    return table(("PART", "RATE"), rows, right=frozenset({"RATE"})) + (
        f"\n\n{tuning['threads']} threads compute and {tuning['load_workers']} load in a server: stored"
        f"\n{example['shape']} {example['quant']}, {example['prompt_tokens']} tokens, cannot start cold in less than "
        f"{example['lower_bound_s']:.2f} s here (I/O {example['io_s']:.2f}, processors {example['cpu_s']:.2f}, "
        f"compute {example['compute_s']:.2f})"
    )


def _rate(bytes_per_s: float) -> str:
    return f"{human_bytes(int(bytes_per_s))}/s"


def _cost(s_per_gb: float | None) -> str:
    return "not here" if s_per_gb is None else f"{s_per_gb:.3f} s/GB"


def _side_table(sides: dict[str, Any]) -> str:
    rows = [
        (
            name,
            f"{side['ttft_s']['median']:.3f}",
            f"{side['ttft_s']['min']:.3f} to {side['ttft_s']['max']:.3f}",
            f"{side['cpu_s']['median']:.2f}",
            f"{side['decode_tokens_per_s']['median']:.1f}",
            human_bytes(int(side["peak_bytes"]["max"])),
        )
        for name, side in sides.items()
    ]
    head = ("SIDE", "TTFT s", "FROM TO", "CPU s", "TOKENS/S", "PEAK")
    return table(head, rows, right=frozenset(head[1:]))


def _ratio_table(ratios: dict[str, Any]) -> str:
    rows = [
        (name, f"{r['ratio']:.2f}", f"{r['per_round']['min']:.2f} to {r['per_round']['max']:.2f}")
        for name, r in ratios.items()
    ]
    return table(("RATIO", "VALUE", "BY ROUND"), rows, right=frozenset({"VALUE", "BY ROUND"}))


for one in (*bench_memory.COMMANDS, *bench_workflows.COMMANDS):
    command.add_command(one)
