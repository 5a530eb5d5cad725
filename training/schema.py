"""The demo assistant's tools: which keys a call has, in which order, and how an answer is written and read.

Knows nothing about sentences or models. docs/demo-model.md describes the same table for people.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

Value = str | int
Call = dict[str, Value]

# Keys in the order in which an answer writes them; the ones after the bar are left out when the sentence
# does not say them.
TOOLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "set_alarm": (("time",), ("day",)),
    "cancel_alarm": (("time",), ("day",)),
    "set_timer": (("minutes",), ()),
    "set_reminder": (("text",), ("time", "day", "in_minutes")),
    "set_lights": (("room",), ("state", "brightness", "color")),
    "read_notifications": (("app",), ()),
    "clear_notifications": (("app",), ()),
    "mute_notifications": (("app",), ("minutes", "until")),
    "unmute_notifications": (("app",), ()),
    "send_message": (("to", "text"), ()),
    "none": ((), ()),
}
OPENING = '\n{"tool":"'
NUMBERS = frozenset({"minutes", "in_minutes", "brightness"})
# Copied from the sentence letter by letter, so they follow its case and its apostrophes.
SPANS = frozenset({"text", "to", "room", "app"})


def fixed_pieces() -> list[str]:
    """All of an answer's last line but the values: `{"tool":"` with the line end before it, `set_alarm","time":"`,
    `","day":"` and so on. None is longer than 32 bytes, because there are programs that have room for no more.
    """
    pieces = {OPENING, '"}'}
    for tool, (needed, optional) in TOOLS.items():
        pieces.add(f'{tool}",{_key(needed[0])}' if needed else f'{tool}"}}')
        pieces |= {'",' + _key(key) for key in (*needed[1:], *optional)}
    return sorted(pieces)


def _key(key: str) -> str:
    """A key up to where its value begins."""
    return f'"{key}":' + ("" if key in NUMBERS else '"')


@dataclass(frozen=True)
class Example:
    """A sentence, the short natural answer to it, and the one call it asks for."""

    say: str
    reply: str
    call: Call

    @property
    def answer(self) -> str:
        return f"{self.reply}\n{write_call(self.call)}"


def check_call(call: Call) -> None:
    """Raises ValueError naming the tool and the key that break the schema."""
    tool = call.get("tool")
    if not isinstance(tool, str) or tool not in TOOLS:
        raise ValueError(f"{tool!r} is not a tool")
    needed, optional = TOOLS[tool]
    keys = set(call) - {"tool"}
    if missing := set(needed) - keys:
        raise ValueError(f"{tool} lacks {', '.join(sorted(missing))}")
    if extra := keys - set(needed) - set(optional):
        raise ValueError(f"{tool} has no key {', '.join(sorted(extra))}")
    for key in keys:
        want = int if key in NUMBERS else str
        if type(call[key]) is not want:
            raise ValueError(f"{tool}: {key} must be {want.__name__}, not {call[key]!r}")


def write_call(call: Call) -> str:
    """The call as one line of JSON, keys in the schema's order."""
    check_call(call)
    needed, optional = TOOLS[str(call["tool"])]
    ordered = {key: call[key] for key in ("tool", *needed, *optional) if key in call}
    return json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))


def read_call(answer: str) -> Call | None:
    """The call in a model's answer: its last line. None when that is not one well-formed call."""
    try:
        call = json.loads(answer.rstrip("\n").rpartition("\n")[2])
        if not isinstance(call, dict):
            return None
        check_call(call)
    except ValueError:
        return None
    return call
