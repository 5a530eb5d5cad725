"""`flexserve recall`: the operating system takes memory back now."""

from __future__ import annotations

from pathlib import Path

import click

from .common import human_bytes, print_json
from .display import milliseconds
from .sizes import Size
from .world_options import admin_socket_option


@click.command("recall")
@click.argument("size", type=Size(allow_all=True))
@click.option(
    "--deadline",
    "deadline_s",
    type=click.FloatRange(0, 600, min_open=True),
    default=10.0,
    show_default=True,
    metavar="S",
    help="Seconds for saving idle conversations; those that are not saved by then are given up.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object (docs/schemas/recall.json).")
@admin_socket_option
def command(*, size: int | None, deadline_s: float, as_json: bool, admin_socket: Path | None) -> None:
    """Take SIZE (512M, 1.5G, all) of memory back from a running server, and its budget with it.

    The server chooses what costs least to lose and goes on answering. `flexserve budget SIZE` gives memory back.
    """
    import msgspec

    from ..server.bodies import RecallBody
    from ..server.client import ServerClient

    done = ServerClient(admin_socket).recall(RecallBody(size, deadline_s))
    if as_json:
        print_json(msgspec.to_builtins(done))
        return
    asked = "everything" if done.asked_bytes is None else human_bytes(done.asked_bytes)
    saved = f", of which {human_bytes(done.later_bytes)} had to be saved first" if done.later_bytes else ""
    click.echo(
        f"chosen  {human_bytes(done.chosen_bytes)} of {asked} after {milliseconds(done.answered_s)}{saved}\n"
        f"freed   {human_bytes(done.freed_bytes)}, the first after {milliseconds(done.first_byte_s)}, "
        f"all after {milliseconds(done.done_s)}"
    )
    if done.budget is not None:
        soft, held = human_bytes(done.budget.soft_bytes), human_bytes(done.budget.held_bytes)
        click.echo(f"budget  {soft}, of which {held} are held")
