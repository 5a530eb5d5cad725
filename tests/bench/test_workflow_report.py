"""What runs come to: medians, ratios, and what prefetch hid."""

from __future__ import annotations

import pytest

from flexserve.bench.workflow_report import (
    COMPARED,
    by_workflow,
    hidden_loads,
    medians,
    prefetch_part,
    ratios,
)
from flexserve.bench.workflow_run import Done
from flexserve.bench.workflow_sides import Answer


def _done(policy: str, workflow: str, *steps: tuple[float, float]) -> Done:
    """`steps`: time to the first token and of the decode of each, one right after the other."""
    answers, now = [], 0.0
    for ttft_s, decode_s in steps:
        answers.append(Answer(now, now + ttft_s, now + ttft_s + decode_s))
        now = answers[-1].end_s
    return Done(policy, workflow, 0, answers[-1].first_s, tuple(answers), 0.1)


def test_the_ratio_is_the_mean_of_the_workflows_own_ratios_of_medians() -> None:
    done = [
        *(_done("flexserve", "A", (ttft, 1.0)) for ttft in (1.0, 2.0, 9.0)),
        *(_done("lru_fair", "A", (ttft, 1.0)) for ttft in (4.0, 4.0, 1.0)),
        _done("flexserve", "B", (3.0, 1.0)),
        _done("lru_fair", "B", (3.0, 1.0)),
    ]
    found = by_workflow(done)
    assert found["A"]["flexserve"]["latency_s"] == {"median": 2.0, "min": 1.0, "max": 9.0, "count": 3}
    means, each = ratios(medians(found))
    assert each["lru_fair"] == {"A": 0.5, "B": 1.0}
    assert means["lru_fair"] == 0.75
    assert means["lru_as_is"] is None
    assert list(means) == list(COMPARED)


def test_latency_is_until_the_first_token_of_the_last_step() -> None:
    assert _done("flexserve", "A", (1.0, 2.0), (3.0, 40.0)).latency_s == 6.0


def test_a_load_is_hidden_where_the_decode_before_is_as_long() -> None:
    done = [
        _done("flexserve", "A", (1.0, 2.0), (1.5, 3.0), (4.0, 1.0), (1.0, 1.0)),
        _done("no_prefetch", "A", (1.0, 2.0), (3.0, 2.9), (4.0, 8.0), (2.0, 1.0)),
        _done("flexserve", "B", (1.0, 2.0), (1.0, 1.0)),
    ]
    load_s = {"s": 1.0, "m": 2.0, "l": 3.0}
    steps = {"A": ["s", "m", "l", "s"], "B": ["s", "m"]}
    found = hidden_loads(done, steps, load_s)
    assert [(one.workflow, one.step) for one in found] == [("A", 1)]
    assert found[0].saving == 0.5
    part = prefetch_part(found, load_s)
    assert part["saving"] == pytest.approx(0.5)
    assert part["steps"][0]["saving"] == 0.5
    assert prefetch_part([], load_s)["saving"] is None
