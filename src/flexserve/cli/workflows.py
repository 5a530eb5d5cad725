"""`flexserve workflows`: which model is asked after which, as a running server learned it, and what that brought."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import human_bytes, print_json
from .display import duration, printable, table
from .world_options import admin_socket_option

if TYPE_CHECKING:
    from ..core import Workflow, WorkflowReport

CLIENT_CHARS = 8  # of a digest that are shown


@click.group("workflows", invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object (docs/schemas/workflows.json).")
@admin_socket_option
@click.pass_context
def command(context: click.Context, *, as_json: bool, admin_socket: Path | None) -> None:
    """Show the workflows that a running server knows, and what prefetching for them brought.

    Clients are shown as digests. `workflows forget` makes the server forget (docs/workflows.md).
    """
    if context.invoked_subcommand is not None:
        if as_json:
            raise click.UsageError("--json goes behind the verb", context)
        return
    import msgspec

    from ..server.client import ServerClient

    report = ServerClient(admin_socket).workflows()
    if as_json:
        print_json(msgspec.to_builtins(report))
    else:
        click.echo(report_text(report))


@command.command("forget")
@click.argument("workflow", metavar="[ID]", required=False)
@click.option("--client", metavar="NAME", help="All workflows of the client that gives this name.")
@click.option("--anonymous", is_flag=True, help="All workflows of the clients that give no name.")
@click.option("--all", "everything", is_flag=True, help="All workflows, and the sums.")
@click.option("--json", "as_json", is_flag=True, help='One JSON object: {"forgotten": COUNT}.')
@admin_socket_option
def forget(
    *,
    workflow: str | None,
    client: str | None,
    anonymous: bool,
    everything: bool,
    as_json: bool,
    admin_socket: Path | None,
) -> None:
    """Make a running server forget the workflow with this ID, a client's, or all."""
    if sum((workflow is not None, client is not None, anonymous, everything)) != 1:
        raise click.UsageError("give one ID, or one of --client, --anonymous and --all")
    from ..server.bodies import ForgetBody
    from ..server.client import ServerClient

    body = ForgetBody(workflow, client, anonymous, everything)
    gone = ServerClient(admin_socket).forget_workflows(body)
    if as_json:
        print_json({"forgotten": gone})
    else:
        click.echo(f"{gone} workflow{'' if gone == 1 else 's'} forgotten")


def report_text(report: WorkflowReport) -> str:
    """`flexserve workflows`."""
    lines = [f"note: {printable(report.note)}"] if report.note else []
    state = "on" if report.prefetch else "off"
    lines.append(
        f"Prefetch is {state}: {report.hits} of {report.predictions} predictions came true, "
        f"{human_bytes(report.prefetched_bytes)} were there in time, "
        f"{human_bytes(report.wasted_bytes)} in vain, about {report.saved_s:.1f} s saved"
    )
    if not report.workflows:
        return "\n".join([*lines, "No workflow is known."])
    numbers = ("SEEN", "CONFIDENCE", "PREDICTED", "HITS", "PREFETCHED", "SAVED")
    head = ("ID", "CLIENT", "AFTER", "COMES", *numbers, "LAST", "DECLARED")
    rows = [_row(one) for one in report.workflows]
    return "\n".join([*lines, "", table(head, rows, right=frozenset(numbers))])


def _row(one: Workflow) -> tuple[str, ...]:
    return (
        one.id,
        one.client[:CLIENT_CHARS] or "-",
        printable(" ".join(one.steps)),
        printable(one.next_model),
        f"{one.seen}",
        f"{one.confidence:.0%}",
        f"{one.predictions}",
        f"{one.hits / one.predictions:.0%}" if one.predictions else "-",
        human_bytes(one.prefetched_bytes),
        f"{one.saved_s:.1f} s",
        f"{duration(one.last_s_ago)} ago",
        printable(one.declared) or "-",
    )
