"""The trace: every event and every decision with its reason, as JSON lines. A pure function: same events, same bytes.

`flexserve trace` shows it. It has ids, counts and sizes; no prompt, no token, no key.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

from .effects import Decision, Effect
from .events import Event
from .machine import Framework
from .order import Range, Ranges
from .settings import Settings


def lines(number: int, now: float, event: Event, decisions: Iterable[Decision]) -> Iterator[str]:
    """One line for the event, one for each decision; `number` counts events, `now` is in seconds."""
    yield _line({"n": number, "t": round(now, 6), "event": _named(event)})
    for decision in decisions:
        line: dict[str, Any] = {"n": number, "why": decision.why.value}
        if decision.effect is not None:
            line["do"] = _named(decision.effect)
        if decision.facts:
            line["facts"] = dict(decision.facts)
        yield _line(line)


def replay(events: Iterable[tuple[float, Event]], settings: Settings | None = None) -> Iterator[str]:
    """The trace of a sequence of events, from a fresh start."""
    framework = Framework(settings)
    for number, (now, event) in enumerate(events):
        yield from lines(number, now, event, framework.handle(now, event))


def _named(thing: Event | Effect) -> dict[str, Any]:
    return {"type": type(thing).__name__} | {
        one.name: _plain(getattr(thing, one.name)) for one in fields(thing)
    }


def _plain(value: Any) -> Any:
    """Ranges as [first, count]; parts as objects; everything else as it is."""
    if isinstance(value, Range):
        return [value.first, value.count]
    if isinstance(value, tuple | Ranges):
        return [_plain(one) for one in value]
    if hasattr(value, "__dataclass_fields__"):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    return value


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=True)
