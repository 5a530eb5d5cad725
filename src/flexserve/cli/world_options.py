"""What `run` and `serve` share: which world, which sealed model with which licence, which admin socket."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..errors import NotFound
from ..worlds import WORLD_NAMES
from ..worlds.base import ModelSource

F = TypeVar("F", bound=Callable[..., Any])


def world_options(function: F) -> F:
    """`--world`, `--threads`, `--context`: arguments `world_name`, `threads`, `context_tokens`."""
    for option in (
        click.option(
            "--context",
            "context_tokens",
            type=click.IntRange(16, 1 << 20),
            metavar="TOKENS",
            help="Length of the context. Default: the model's, at most 4096.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(1, 1024),
            metavar="N",
            help="Compute threads. Default: one per processor.",
        ),
        click.option(
            "--world",
            "world_name",
            type=click.Choice(WORLD_NAMES),
            default="linux",
            show_default=True,
            help="Where the model runs. `fake` is a test double: nothing is protected, answers are echoes.",
        ),
    ):
        function = option(function)
    return function


def admin_socket_option(function: F) -> F:
    """`--admin-socket PATH`, argument `admin_socket`."""
    return click.option(
        "--admin-socket",
        type=click.Path(path_type=Path),
        metavar="PATH",
        envvar="FLEXSERVE_ADMIN_SOCKET",
        show_envvar=True,
        help="The server's admin socket. Default: flexserve/admin.sock in $XDG_RUNTIME_DIR, "
        "else /tmp/flexserve-UID/admin.sock.",
    )(function)


def no_copy_option(function: F) -> F:
    """`--no-copy`, argument `no_copy`."""
    return click.option(
        "--no-copy",
        is_flag=True,
        help="Use the sealed model itself, not the device's own copy (`flexserve optimize`).",
    )(function)


def model_source(
    name: str, sealed: Path, licence: Path | None, *, copy: Path | None = None, use_copy: bool = True
) -> ModelSource:
    """The model and its licence: by default the .lic beside the .flex. Raises `NotFound`."""
    if not sealed.exists():
        raise NotFound(f"there is no sealed model {sealed}")
    if licence is None:
        licence = sealed.with_suffix(".lic")
        if not licence.exists():
            raise NotFound(
                f"there is no licence {licence}",
                hint="give its path, or put it beside the model under that name",
            )
    elif not licence.exists():
        raise NotFound(f"there is no licence {licence}")
    return ModelSource(name, sealed, licence, copy, use_copy)
