"""The workflow log as plain values, for storage: names of models, digests, counts, ages. No prompt, no client's name.

Knows the form, and checks all of it: a file may be from another time. Does not know files and keys.
"""

from __future__ import annotations

import math
from typing import Any

from .settings import Settings
from .workflows import MAX_NEXT, Followers, Step, Tally, Totals, WorkflowLog

VERSION = 1
MAX_TEXT = 256
_TALLY = ("weight", "seen", "predictions", "hits", "nbytes", "saved_s", "declared")
_TOTALS = ("predictions", "hits", "nbytes", "wasted", "saved_s")


def dump(log: WorkflowLog, now: float) -> dict[str, Any]:
    """All of it; times as ages in seconds. What can be encoded as JSON."""
    return {
        "version": VERSION,
        "totals": [getattr(log.totals, name) for name in _TOTALS],
        "followers": [
            [
                client,
                [list(step) for step in steps],
                max(now - followers.last, 0.0),
                [
                    [list(step), *(getattr(tally, name) for name in _TALLY)]
                    for step, tally in followers.tallies.items()
                ],
            ]
            for (client, steps), followers in log.followers.items()
        ],
    }


def load(data: Any, now: float, away_s: float, settings: Settings) -> WorkflowLog:
    """The reverse; `away_s`: how long ago it was dumped. Raises `ValueError` for anything else."""
    log = WorkflowLog()
    _require(isinstance(data, dict) and data.get("version") == VERSION, "another version")
    totals, followers = data.get("totals"), data.get("followers")
    _require(isinstance(totals, list) and len(totals) == len(_TOTALS), "no totals")
    log.totals = Totals(
        *(_number(n, whole=name != "saved_s") for name, n in zip(_TOTALS, totals, strict=True))
    )
    _require(isinstance(followers, list) and len(followers) <= 1 << 16, "no list of what followed")
    for one in followers[-settings.workflow_limit :]:
        _require(isinstance(one, list) and len(one) == 4, "an entry of another form")
        client, steps, age_s, tallies = one
        _require(isinstance(steps, list) and 1 <= len(steps) <= 2, "a sequence of another length")
        _require(isinstance(tallies, list) and len(tallies) <= MAX_NEXT, "too many that followed")
        made = Followers(now - _number(age_s) - max(away_s, 0.0))
        for tally in tallies:
            _require(isinstance(tally, list) and len(tally) == 1 + len(_TALLY), "a count of another form")
            step, weight, seen, predictions, hits, nbytes, saved_s, declared = tally
            made.tallies[_step(step)] = Tally(
                weight=_number(weight),
                seen=_number(seen, whole=True),
                predictions=_number(predictions, whole=True),
                hits=_number(hits, whole=True),
                nbytes=_number(nbytes, whole=True),
                saved_s=_number(saved_s),
                declared=_text(declared),
            )
        log.followers[_text(client), tuple(_step(step) for step in steps)] = made
    return log


def _step(data: Any) -> Step:
    _require(isinstance(data, list) and len(data) == 2, "a step of another form")
    return Step(_text(data[0]), _text(data[1]))


def _text(data: Any) -> str:
    _require(isinstance(data, str) and len(data) <= MAX_TEXT, "a name that is none")
    return str(data)


def _number(data: Any, *, whole: bool = False) -> Any:
    kinds = int if whole else int | float
    ok = (
        isinstance(data, kinds) and not isinstance(data, bool) and math.isfinite(data) and 0 <= data < 1 << 62
    )
    _require(ok, "a number that is none")
    return data


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(f"the workflow log has {what}")
