"""The `flexserve` command: a table of verbs, loaded one at a time, and how errors end a call.

Knows names and one line about each verb, so that `flexserve --help` imports none of them. A verb's module
has a click command called `command`; a verb whose module is not installed is not there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NoReturn

import click

from .. import __version__
from ..errors import FlexServeError, Usage
from .common import print_error, was_interrupted

VERBS: dict[str, tuple[str, str]] = {
    "run": ("run", "answer a prompt with a sealed model"),
    "embed": ("embed", "make embeddings of texts with a sealed model"),
    "serve": ("serve", "serve models over an OpenAI-compatible API"),
    "ps": ("ps", "show what a running server does and holds in memory"),
    "recall": ("recall", "take memory back from a running server"),
    "budget": ("budget", "show or set how much memory a running server may hold"),
    "trace": ("trace", "show what a running server decided about memory, and why"),
    "workflows": ("workflows", "show or forget what a running server expects to be asked next"),
    "list": ("list", "name the models of a running server"),
    "keys": ("keys", "make vendor and device keys; manage trusted vendors"),
    "seal": ("seal", "encrypt and sign a GGUF model"),
    "license": ("license", "let one device use a sealed model"),
    "inspect": ("inspect", "show what a sealed model says about itself, without any key"),
    "verify": ("verify", "check every byte of a sealed model"),
    "optimize": ("optimize", "make this device's own, faster copy of a sealed model"),
    "bench": ("bench", "measure"),
    "demo": ("demo", "show what the four demo models do together"),
    "tz": ("tz", "the trustzone world: our firmware on an emulated Arm machine"),
    "doctor": ("doctor", "say what this machine can protect, and against whom"),
}

EXIT_INTERRUPTED = 130  # as shells report SIGINT


class LazyGroup(click.Group):
    """A group of the verbs in `VERBS` that ends every call by the rules of errors.py."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, (module, _) in VERBS.items() if find_spec(f"{__package__}.{module}")]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = import_module(f"{__package__}.{VERBS[cmd_name][0]}")
        command = module.command
        assert isinstance(command, click.Command), f"{module.__name__}.command is not a click command"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, VERBS[name][1]) for name in self.list_commands(ctx)])

    def main(  # type: ignore[override]  # click has two overloads, by standalone_mode
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        **extra: Any,
    ) -> NoReturn:
        """As click's, but errors are ours: `error: ...` and `hint: ...` on stderr, exit code of the tree."""
        try:
            result = super().main(args, prog_name, **{**extra, "standalone_mode": False})
        except FlexServeError as error:
            if was_interrupted(error):
                _exit_interrupted()
            print_error(error)
            sys.exit(error.exit_code)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.UsageError as error:
            if (
                isinstance(error, click.BadParameter)
                and isinstance(error.param, click.Argument)
                and error.ctx
            ):
                error.param_hint = f"'{error.param.make_metavar(error.ctx).strip('[].')}'"  # SIZE, not [SIZE]
            message = error.format_message()
            click.echo(f"error: {message[:1].lower()}{message[1:].rstrip('.')} ({Usage.code})", err=True)
            if error.ctx is not None:
                click.echo(f"hint: `{error.ctx.command_path} --help` shows how it is called", err=True)
            sys.exit(error.exit_code)
        except click.ClickException as error:
            click.echo(f"error: {error.format_message()} ({FlexServeError.code})", err=True)
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _exit_interrupted()
        except Exception as error:
            if not was_interrupted(error):
                raise
            _exit_interrupted()
        sys.exit(result if isinstance(result, int) else 0)


def _exit_interrupted() -> NoReturn:
    click.echo("error: interrupted", err=True)
    sys.exit(EXIT_INTERRUPTED)


@click.command(cls=LazyGroup)
@click.version_option(__version__, prog_name="flexserve", message="%(prog)s %(version)s")
def cli() -> None:
    """Serve language models on your own device so that weights, prompts and answers stay secret, and memory
    still belongs to the operating system."""
