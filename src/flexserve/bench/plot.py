"""Draws a recorded cold start as a timeline of its four stages: read, decrypt, place, compute.

The only file that knows matplotlib, which is optional (`pip install -e '.[bench]'` in a clone).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StorageFailure, Usage
from .timeline import SAMPLE_S, Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colour-blind safe (Okabe and Ito).
COLOURS = {"read": "#56b4e9", "decrypt": "#e69f00", "place": "#009e73", "compute": "#0072b2"}


def require_matplotlib() -> None:
    """Raises `Usage` before anything is measured in vain."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise Usage(
            "drawing the plot needs matplotlib, which is not installed",
            hint="pip install -e '.[bench]' in the clone of the repository, or leave --plot out",
        ) from None


def save(figure: Figure, path: Path) -> None:
    """Write an image; the suffix decides its format. Raises `Usage`, `StorageFailure`."""
    try:
        figure.savefig(path, dpi=140)
    except ValueError as error:
        raise Usage(f"cannot draw {path}: {error}", hint="name a .png, .svg or .pdf file") from error
    except OSError as error:
        raise StorageFailure(f"cannot write {path}: {error.strerror}") from error


def draw(timeline: Timeline, title: str, path: Path) -> None:
    """Write an image; the suffix decides its format. Raises `Usage`, `StorageFailure`."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.55 * timeline.workers + 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    lanes, cores, loaded = figure.subplots(
        3, 1, sharex=True, height_ratios=(0.55 * timeline.workers + 0.3, 1.1, 1.1)
    )
    for worker in range(timeline.workers):
        spans = [s for s in timeline.spans if s.worker == worker]
        for stage, bars in {
            "read": [(s.read_begin_s, s.read_end_s - s.read_begin_s) for s in spans],
            "decrypt": [(s.read_end_s, s.decrypt_end_s - s.read_end_s) for s in spans],
            "place": [(s.place_begin_s, s.place_end_s - s.place_begin_s) for s in spans],
        }.items():
            label = stage if worker == 0 else None
            lanes.broken_barh(bars, (worker - 0.4, 0.8), facecolors=COLOURS[stage], linewidth=0, label=label)
    lanes.set_yticks(range(timeline.workers), [f"loader {n + 1}" for n in range(timeline.workers)])
    lanes.set_ylim(timeline.workers - 0.5, -0.5)
    lanes.set_title(title, loc="left", fontsize=11)

    inside = [(at, busy) for at, busy in timeline.compute if at <= timeline.ttft_s + SAMPLE_S]
    cores.stackplot(
        [at for at, _ in inside],
        [busy for _, busy in inside],
        colors=[COLOURS["compute"]],
        labels=["compute"],
    )
    cores.set_ylim(0, timeline.cores * 1.05)
    cores.set_yticks(range(timeline.cores + 1))
    cores.set_ylabel("cores busy\ncomputing")

    done = sorted((s.place_end_s, s.length_bytes) for s in timeline.spans)
    total = 0.0
    steps = [(0.0, 0.0)]
    for at, length in done:
        total += length / 1e9
        steps.append((at, total))
    loaded.step([at for at, _ in steps], [gb for _, gb in steps], where="post", color=COLOURS["place"])
    loaded.set_ylabel("GB placed")
    loaded.set_ylim(0)
    loaded.set_xlabel("seconds since the request")

    last = max([timeline.ttft_s, *(s.place_end_s for s in timeline.spans)])
    for axes in (lanes, cores, loaded):
        axes.set_xlim(0, last * 1.02)
        axes.axvline(timeline.ttft_s, color="black", linewidth=1, linestyle="--")
        axes.spines[["top", "right"]].set_visible(False)
    cores.annotate(
        f"first token {timeline.ttft_s:.2f} s",
        (timeline.ttft_s, timeline.cores),
        xytext=(-6, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2},
    )
    figure.legend(loc="outside upper right", ncols=4, frameon=False, fontsize=9)
    save(figure, path)
