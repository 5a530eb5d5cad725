"""Draws workflows or groups as bars, one for each policy (paper, figures 8 and 9). Needs matplotlib, as plot.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .plot import require_matplotlib, save
from .workflow_run import POLICIES

# Colour-blind safe (Okabe and Ito); the fair twin of a policy is the paler one.
COLOURS = {
    "load_per_request": "#d55e00",
    "keep_all": "#999999",
    "timer": "#e69f00",
    "lru": "#009e73",
    "no_prefetch": "#56b4e9",
    "flexserve": "#0072b2",
}


def draw(seconds: Mapping[str, Mapping[str, float]], what: str, path: Path) -> None:
    """`seconds`: of each workflow (or group) and policy; `what`: the axis. The suffix decides the format.

    Raises `Usage`, `StorageFailure`.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    policies = [policy for policy in POLICIES if any(policy in row for row in seconds.values())]
    figure = Figure(figsize=(max(6.0, 1.6 * len(seconds) + 2), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.85 / len(policies)
    for number, policy in enumerate(policies):
        at = [place + (number - (len(policies) - 1) / 2) * width for place in range(len(seconds))]
        name = policy.removesuffix("_as_is").removesuffix("_fair")
        axes.bar(
            at,
            [row.get(policy, 0.0) for row in seconds.values()],
            width,
            color=COLOURS[name],
            alpha=0.5 if policy.endswith("_fair") else 1.0,
            label=policy,
        )
    axes.set_xticks(range(len(seconds)), list(seconds), rotation=20, ha="right")
    axes.set_ylabel(what)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    save(figure, path)
