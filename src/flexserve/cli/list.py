"""`flexserve list`: the models of a running server."""

from __future__ import annotations

from pathlib import Path

import click

from .common import print_json
from .display import models_table
from .world_options import admin_socket_option


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object (docs/schemas/list.json).")
@admin_socket_option
def command(*, as_json: bool, admin_socket: Path | None) -> None:
    """Name the models of a running server."""
    import msgspec

    from ..server.client import ServerClient

    models = ServerClient(admin_socket).models()
    if as_json:
        print_json({"models": msgspec.to_builtins(models)})
    else:
        click.echo(models_table(models))
