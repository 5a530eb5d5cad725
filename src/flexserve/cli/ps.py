"""`flexserve ps`: what a running server does and holds in memory."""

from __future__ import annotations

from pathlib import Path

import click

from .common import print_json
from .display import status_text
from .world_options import admin_socket_option


@click.command("ps")
@click.option("--json", "as_json", is_flag=True, help="One JSON object (docs/schemas/ps.json).")
@admin_socket_option
def command(*, as_json: bool, admin_socket: Path | None) -> None:
    """Show what a running server does and holds in memory."""
    import msgspec

    from ..server.client import ServerClient

    status = ServerClient(admin_socket).ps()
    if as_json:
        print_json(msgspec.to_builtins(status))
    else:
        click.echo(status_text(status))
