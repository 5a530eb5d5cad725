"""What `run` and `serve` share: which world, which sealed model with which licence, which admin socket."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from ..core import ModelInfo
from ..errors import NotFound, Usage
from ..sealed.files import opened
from ..worlds import WORLD_NAMES
from ..worlds.base import AdapterSource, ModelSource, World
from .common import FILE, Whole
from .display import printable, warn

F = TypeVar("F", bound=Callable[..., Any])


def world_options(function: F) -> F:
    """`--world`, `--threads`, `--load-workers`, `--context`: arguments `world_name`, `threads`, `load_workers`,
    `context_tokens`."""
    for option in (
        click.option(
            "--context",
            "context_tokens",
            type=Whole(16, 1 << 20),
            metavar="TOKENS",
            help="Length of the context. Default: the model's, at most 4096.",
        ),
        click.option(
            "--threads",
            type=Whole(1, 1024),
            metavar="N",
            help="Compute threads. Default: as calibrated (`flexserve serve`), else one per processor.",
        ),
        click.option(
            "--load-workers",
            type=Whole(1, 64),
            metavar="N",
            help="Threads that read and decrypt weights. Default: as calibrated, else 3.",
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


def adapter_options(function: F) -> F:
    """`--adapter`, `--adapter-license`, `--adapter-scale`, as the one argument `adapter`. Raises `Usage`."""

    @wraps(function)
    def command(
        *,
        adapter: Path | None,
        adapter_licence: Path | None,
        adapter_scale: float | None,
        **options: Any,
    ) -> Any:
        if adapter is None and (adapter_licence is not None or adapter_scale is not None):
            raise Usage("--adapter-license and --adapter-scale belong to an --adapter")
        scale = 1.0 if adapter_scale is None else adapter_scale
        return function(adapter=None if adapter is None else (adapter, adapter_licence, scale), **options)

    for option in (
        click.option(
            "--adapter-scale",
            type=float,
            metavar="S",
            help="How much of what the adapter adds: 0.5 is half. Default: 1.",
        ),
        click.option(
            "--adapter-license",
            "adapter_licence",
            type=FILE,
            metavar="A.lic",
            help="Default: the .lic file beside the adapter.",
        ),
        click.option(
            "--adapter", type=FILE, metavar="A.flex", help="A sealed LoRA adapter to apply to the model."
        ),
    ):
        command = option(command)
    return command  # type: ignore[return-value]


def model_source(
    name: str,
    sealed: Path,
    licence: Path | None,
    adapter: tuple[Path, Path | None, float] | None = None,
    *,
    copy: Path | None = None,
    use_copy: bool = True,
) -> ModelSource:
    """The model and its licence: by default the .lic beside the .flex; the same of its adapter. Raises `NotFound`,
    `Usage`."""
    licence = _licence_of(sealed, licence, "sealed model")
    added = None
    if adapter is not None:
        path, its_licence, scale = adapter
        added = AdapterSource(path, _licence_of(path, its_licence, "sealed adapter"), scale)
    return ModelSource(name, sealed, licence, copy, use_copy, added)


def warn_of_long_context(world: World, source: ModelSource, info: ModelInfo, wanted: int | None) -> None:
    """Say so when `--context` gives a model more than it was trained with. `info`: what it was registered as.

    The sealed file's own description says what it was trained with; that it is authentic is known by now.
    """
    from ..sealed.reader import read_manifest

    if wanted is None or world.name == "fake":
        return
    with opened(source.sealed, "sealed model") as fd:
        trained = read_manifest(fd).manifest.description.context_tokens
    if 0 < trained < wanted and trained < info.context_tokens:
        warn(
            f"{printable(source.name)} was trained with contexts of {trained} tokens, and --context gives it {wanted}: "
            "what it says beyond them may make no sense"
        )


def _licence_of(sealed: Path, licence: Path | None, what: str) -> Path:
    if not sealed.exists():
        raise NotFound(f"there is no {what} {sealed}")
    if licence is None:
        licence = sealed.with_suffix(".lic")
        if not licence.exists():
            raise NotFound(
                f"there is no licence {licence}",
                hint=f"give its path, or put it beside the {what.split()[1]} under that name",
            )
    elif not licence.exists():
        raise NotFound(f"there is no licence {licence}")
    return licence
