"""`flexserve budget`: how much memory a running server may hold."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from ..core import Budget, ModelStatus
from .common import human_bytes, print_json
from .display import printable, table, warn
from .sizes import Size
from .world_options import admin_socket_option


@click.command("budget")
@click.argument("size", type=Size(), required=False)
@click.option("--hard", type=Size(), metavar="SIZE", help="The cap that no offer lifts the budget above.")
@click.option("--floor", type=Size(), metavar="SIZE", help="What no recall pushes the budget below.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object (docs/schemas/budget.json).")
@admin_socket_option
def command(
    *, size: int | None, hard: int | None, floor: int | None, as_json: bool, admin_socket: Path | None
) -> None:
    """Show a running server's memory budget, or set it to SIZE (512M, 1.5G).

    It is for weights, adapters, keys and values. Recalls lower it and offers raise it, between floor and hard cap: SIZE
    holds until memory gets short or plenty, --hard for good. One with which no model could answer is refused.
    """
    import msgspec

    from ..server.bodies import BudgetBody
    from ..server.client import ServerClient

    client = ServerClient(admin_socket)
    budget = client.budget(BudgetBody(size, hard, floor))
    if size is not None or hard is not None:
        warn_of_silent(client.ps().models, budget)
    if as_json:
        print_json(msgspec.to_builtins(budget))
        return
    rows = [
        (
            "held",
            human_bytes(budget.held_bytes),
            "weights in memory or on their way, adapters, keys and values",
        ),
        ("budget", human_bytes(budget.soft_bytes), "what may be held now"),
        ("floor", human_bytes(budget.floor_bytes), "no recall pushes the budget below"),
        ("hard cap", human_bytes(budget.hard_bytes), "no offer lifts the budget above"),
    ]
    if budget.wanted_bytes:
        rows.append(("wanted", human_bytes(budget.wanted_bytes), "what answers in progress could use more"))
    click.echo(table(("MEMORY", "SIZE", ""), rows, right=frozenset({"SIZE"})))


def warn_of_silent(models: Iterable[ModelStatus], budget: Budget) -> None:
    """Name those that do not answer with this budget."""
    for model in models:
        if model.least_bytes > budget.soft_bytes and not model.poisoned:
            warn(
                f"{printable(model.info.name)} does not answer with this budget: it needs "
                f"{human_bytes(model.least_bytes)} for keys and values and a window of its weights"
            )
