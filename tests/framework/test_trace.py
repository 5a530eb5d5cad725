"""The trace: every decision with its reason; the same events give the same bytes, on any run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from flexserve.framework.effects import MEANING, Why
from flexserve.framework.trace import lines, replay

from .simulate import SETTINGS, simulate

ROOT = Path(__file__).parents[2]


def test_replaying_the_same_events_gives_the_same_bytes() -> None:
    world = simulate(600, seed=3)
    events = [(now, event) for now, event, _ in world.log]
    first = [
        line for n, (now, event, decided) in enumerate(world.log) for line in lines(n, now, event, decided)
    ]
    assert first == list(replay(events, SETTINGS))


def test_another_process_with_another_hash_seed_writes_the_same_trace() -> None:
    program = (
        "from tests.framework.simulate import *; from flexserve.framework.trace import replay; import hashlib\n"
        "events = [(t, e) for t, e, _ in simulate(300, seed=5).log]\n"
        "print(hashlib.sha256('\\n'.join(replay(events, SETTINGS)).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_every_line_is_json_with_a_reason_that_is_documented() -> None:
    world = simulate(600, seed=3)
    for n, (now, event, decided) in enumerate(world.log):
        head, *rest = [json.loads(line) for line in lines(n, now, event, decided)]
        assert head["n"] == n and head["event"]["type"] == type(event).__name__
        for line in rest:
            assert Why(line["why"]) in MEANING
            assert line.keys() <= {"n", "why", "do", "facts"}


def test_every_reason_has_its_words() -> None:
    assert set(MEANING) == set(Why)
