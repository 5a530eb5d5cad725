"""What runs of workflows come to: per workflow and policy, ratios, what prefetch saved. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .stats import Spread
from .workflow_run import Done

# Policies that FlexServe is compared with, and what is promised (issue: mean of per-workflow ratios).
PROMISES = {
    "lru_as_is": 0.55,
    "lru_fair": 0.85,
    "load_per_request_as_is": 0.50,
    "load_per_request_fair": 0.70,
}
COMPARED = (*PROMISES, "timer_as_is", "timer_fair", "keep_all_as_is", "keep_all_fair", "no_prefetch")


@dataclass(frozen=True)
class HiddenLoad:
    """A step whose load could hide behind the decode before it: that takes at least as long. Medians, seconds."""

    workflow: str
    step: int
    decode_before_s: float
    load_s: float  # of all the model's weights, with nothing else to do
    ttft_s: float
    no_prefetch_ttft_s: float

    @property
    def saving(self) -> float:
        """Share of the time to the step's first token that prefetch saved."""
        return 1 - self.ttft_s / self.no_prefetch_ttft_s


def by_workflow(done: Iterable[Done]) -> dict[str, dict[str, Any]]:
    """Of each workflow and policy: the spread of the latency, and every run."""
    found: dict[str, dict[str, list[Done]]] = {}
    for one in done:
        found.setdefault(one.workflow, {}).setdefault(one.policy, []).append(one)
    return {
        workflow: {
            policy: {
                "latency_s": asdict(Spread.of([r.latency_s for r in runs])),
                "runs": [_run(r) for r in runs],
            }
            for policy, runs in policies.items()
        }
        for workflow, policies in found.items()
    }


def ratios(
    medians: Mapping[str, Mapping[str, float]], of: str = "flexserve", to: Sequence[str] = COMPARED
) -> tuple[dict[str, float | None], dict[str, dict[str, float]]]:
    """`medians`: of each workflow and policy. The mean ratio of one policy to each other (None: not measured), and the
    ratios of each workflow."""
    each = {
        policy: {name: one[of] / one[policy] for name, one in medians.items() if of in one and policy in one}
        for policy in to
    }
    return {p: statistics.mean(r.values()) if r else None for p, r in each.items()}, each


def medians(workflows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of what `by_workflow` gave."""
    return {
        name: {policy: one["latency_s"]["median"] for policy, one in policies.items()}
        for name, policies in workflows.items()
    }


def hidden_loads(
    done: Sequence[Done], models: Mapping[str, Sequence[str]], load_s: Mapping[str, float]
) -> list[HiddenLoad]:
    """`models`: of each workflow's steps; `load_s`: of each model. Steps on the model of the step before have nothing
    to load and are left out, and those whose model is needed by an earlier step as well."""
    found = []
    for workflow, steps in models.items():
        for step in range(1, len(steps)):
            with_it, without = (_runs(done, policy, workflow) for policy in ("flexserve", "no_prefetch"))
            if not with_it or not without or steps[step] in steps[:step]:
                continue
            decode_s = statistics.median(one.answers[step - 1].decode_s for one in without)
            if decode_s < load_s[steps[step]]:
                continue
            ttfts = (
                statistics.median(one.answers[step].ttft_s for one in runs) for runs in (with_it, without)
            )
            found.append(HiddenLoad(workflow, step, decode_s, load_s[steps[step]], *ttfts))
    return found


def prefetch_part(loads: Sequence[HiddenLoad], load_s: Mapping[str, float]) -> dict[str, Any]:
    """For the JSON; `saving` is the mean of the steps' savings."""
    return {
        "load_s": dict(load_s),
        "steps": [asdict(one) | {"saving": one.saving} for one in loads],
        "saving": statistics.mean(one.saving for one in loads) if loads else None,
    }


def _runs(done: Sequence[Done], policy: str, workflow: str) -> list[Done]:
    return [one for one in done if one.policy == policy and one.workflow == workflow]


def _run(one: Done) -> dict[str, Any]:
    return {
        "round": one.round,
        "latency_s": one.latency_s,
        "first_touch_s_per_gb": one.first_touch_s_per_gb,
        "steps": [
            {
                "ttft_s": a.ttft_s,
                "decode_s": a.decode_s,
                "load_bytes": a.load_bytes,
                "cached_prompt_tokens": a.cached_prompt_tokens,
                "prefetched_bytes": a.prefetched_bytes,
            }
            for a in one.answers
        ],
    }
