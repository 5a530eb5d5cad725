"""`flexserve trace`: what the Framework decided about memory, and why."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from .display import printable
from .world_options import admin_socket_option

FOLLOW_PERIOD_S = 0.3


@click.command("trace")
@click.option("--follow", is_flag=True, help="Go on with what happens from now on, until Ctrl-C.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object for each line (docs/schemas/trace.json)."
)
@admin_socket_option
def command(*, follow: bool, as_json: bool, admin_socket: Path | None) -> None:
    """Show the newest decisions about memory of a running server: what happened, what was done about it, and why.

    It has ids, counts and sizes; no prompt, no token and no key (docs/framework.md).
    """
    from ..server.client import ServerClient

    client = ServerClient(admin_socket)
    restarts, after = None, 0
    while True:
        trace = client.trace(after)
        if restarts is not None and trace.restarts != restarts:
            after = 0  # another secure world, which counts from the beginning
            trace = client.trace()
        restarts = trace.restarts
        for line in trace.lines:
            row = json.loads(line)
            after = max(after, row["n"])
            click.echo(line if as_json else readable(row))
        if not follow:
            return
        time.sleep(FOLLOW_PERIOD_S)


def readable(row: dict[str, Any]) -> str:
    """A line of the trace for people."""
    if "event" in row:
        text = f"{row['n']:>6} {row['t']:>10.3f} s  {_named(row['event'])}"
    else:
        text = f"{'':>21}{row['why']}: {_named(row['do'])}" if "do" in row else f"{'':>21}{row['why']}"
    facts = _values(row.get("facts", {}))
    return printable(f"{text}  ({facts})" if facts else text)


def _named(thing: dict[str, Any]) -> str:
    return f"{thing['type']} {_values({k: v for k, v in thing.items() if k != 'type'})}".rstrip()


def _values(values: dict[str, Any]) -> str:
    return " ".join(f"{name}={_value(value)}" for name, value in values.items())


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
