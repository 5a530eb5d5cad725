"""How answers, their times and tables look on a terminal. Knows no world and no server."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

import click

from ..core import Finished, FinishReason, ModelInfo, ModelStatus, Timings, WorldStatus
from .common import human_bytes, human_count

# What a terminal would act on: C0 and C1 controls but tab and newline, and the direction overrides.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` with every character a terminal would act on replaced: a model must not drive the terminal."""
    return _CONTROLS.sub("\ufffd", text)


def write_answer(text: str) -> None:
    """Some of an answer to stdout, at once; as it is into a pipe, made harmless on a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(text: str) -> None:
    """A line beside the answer: dim, on stderr."""
    click.echo(click.style(text, dim=True) if _styled() else text, err=True)


def layout_note(info: ModelInfo) -> str:
    """Why a model is not in execution layout, in one line."""
    return f"{printable(info.name)}: plain layout; {printable(info.layout_hint)}"


def warn(text: str) -> None:
    """A line nobody should miss, on stderr."""
    text = f"warning: {text}"
    click.echo(click.style(text, fg="yellow", bold=True) if _styled() else text, err=True)


def _styled() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def seconds(value: float) -> str:
    """`0.42 s`, `3 ms`."""
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.0f} ms"


def milliseconds(value_s: float) -> str:
    """`1.2 ms`, `135 ms`, `2.41 s`."""
    if value_s >= 1:
        return f"{value_s:.2f} s"
    return f"{1000 * value_s:.0f} ms" if value_s >= 0.1 else f"{1000 * value_s:.1f} ms"


def summary(finished: Finished) -> str:
    """One line about an answer."""
    t = finished.timings
    if finished.finish_reason == FinishReason.CANCELLED:
        return "cancelled"
    parts = [f"{t.prompt_tokens} + {t.output_tokens} tokens", f"first after {seconds(t.ttft_s)}"]
    if t.decode_tokens_per_s:
        parts.append(f"then {t.decode_tokens_per_s:.1f} per second")
    parts.append(f"{seconds(t.total_s)} in all")
    if finished.finish_reason == FinishReason.LENGTH:
        parts.append("cut at the token limit")
    return ", ".join(parts)


def breakdown(t: Timings, *, start_s: float = 0.0, register_s: float = 0.0) -> str:
    """Where the time of one answer went, a line per part. `start_s`, `register_s`: before the request."""
    rows: list[tuple[str, str, str]] = []
    if start_s or register_s:
        rows.append(("start", seconds(start_s), "the secure world, before the request"))
        rows.append(("register", seconds(register_s), "model and licence authenticated, no weights loaded"))
    rows.append(("queue", seconds(t.queue_s), ""))
    rows.append(("tokenize", seconds(t.tokenize_s), f"{t.prompt_tokens} tokens"))
    rows.append(("prefill", seconds(t.prefill_s), _speed(t.prefill_tokens_per_s)))
    if t.load_bytes:
        parts = ", ".join(
            f"{name} {seconds(value)}"
            for name, value in (("read", t.read_s), ("decrypt", t.decrypt_s), ("place", t.place_s))
        )
        rows.append(("  load", human_bytes(t.load_bytes), f"{parts}, beside the prefill"))
    if t.faults:
        rows.append(("  waited", seconds(t.fault_wait_s), f"{t.faults} times for a page"))
    rows.append(("first token", seconds(t.ttft_s), "after the request"))
    rows.append(
        ("decode", seconds(t.decode_s), f"{t.output_tokens} tokens{_speed(t.decode_tokens_per_s, ', ')}")
    )
    rows.append(("total", seconds(t.total_s), ""))
    return "\n".join(f"{name:<12}{value:>9}  {what}".rstrip() for name, value, what in rows)


def _speed(tokens_per_s: float, before: str = "") -> str:
    return f"{before}{tokens_per_s:.1f} tokens/s" if tokens_per_s else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[str] = frozenset()) -> str:
    """Aligned columns; those named in `right` to the right, as numbers read best."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = []
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def models_table(models: Sequence[ModelInfo]) -> str:
    """`flexserve list`."""
    rows = [
        (
            printable(m.name),
            f"{printable(m.model_id)} v{m.model_version}{f' + {printable(m.adapter)}' if m.adapter else ''}",
            printable(m.architecture),
            printable(m.quantization),
            human_count(m.parameters),
            f"{m.context_tokens}",
            human_bytes(m.weight_bytes),
            "yes" if m.has_chat_template else "no",
        )
        for m in models
    ]
    head = ("NAME", "MODEL", "ARCH", "QUANT", "PARAMS", "CONTEXT", "WEIGHTS", "CHAT")
    return table(head, rows, right=frozenset({"PARAMS", "CONTEXT", "WEIGHTS"}))


def status_text(status: WorldStatus) -> str:
    """`flexserve ps`."""
    restarts = f", {status.restarts} restarts" if status.restarts else ""
    lines = [
        f"{status.world} world, process {status.pid}, up {duration(status.uptime_s)}{restarts}, "
        f"{status.active_requests} active and {status.waiting_requests} waiting requests",
        f"Flex-Mem: {printable(status.flexmem)}",
    ]
    if status.budget is not None:
        b = status.budget
        lines.append(
            f"Memory: {human_bytes(b.held_bytes)} held of a budget of {human_bytes(b.soft_bytes)} "
            f"(floor {human_bytes(b.floor_bytes)}, hard cap {human_bytes(b.hard_bytes)})"
            + (f", {human_bytes(b.wanted_bytes)} more wanted" if b.wanted_bytes else "")
        )
    lines.append(f"Prefetch: {'on' if status.prefetch else 'off'}")
    rows = [
        (
            printable(m.info.name),
            human_bytes(m.info.weight_bytes),
            f"{human_bytes(m.resident_bytes)} ({100 * m.resident_bytes // max(m.info.weight_bytes, 1)} %)",
            human_bytes(m.lazy_bytes),
            human_bytes(m.prefix_bytes),
            human_bytes(m.kv_bytes),
            f"{m.sessions} ({human_bytes(m.session_bytes)})",
            human_bytes(m.budget_bytes),
            f"{m.requests}",
            "never" if m.last_used_s_ago is None else f"{duration(m.last_used_s_ago)} ago",
            _state(m),
        )
        for m in status.models
    ]
    if rows:
        numbers = ("SIZE", "RESIDENT", "LAZY", "PREFIX", "KV", "SESSIONS", "BUDGET", "REQUESTS")
        head, right = ("MODEL", *numbers, "LAST USE", "STATE"), frozenset(numbers)
        lines += ["", table(head, rows, right=right)]
    return "\n".join(lines)


def _state(m: ModelStatus) -> str:
    if m.poisoned:
        return "NOT AUTHENTIC"
    said = [f"streams {human_bytes(m.streamed_bytes)} a token"] if m.streamed_bytes else []
    if m.pinned:
        said.append("pinned")
    if m.adapter_bytes:
        said.append(f"adapter {human_bytes(m.adapter_bytes)}")
    return ", ".join(said) or "ok"


def duration(value_s: float) -> str:
    """`7 s`, `12 min`, `3.5 h`, `2.1 d`."""
    if value_s < 120:
        return f"{value_s:.0f} s"
    if value_s < 7200:
        return f"{value_s / 60:.0f} min"
    if value_s < 172800:
        return f"{value_s / 3600:.1f} h"
    return f"{value_s / 86400:.1f} d"
