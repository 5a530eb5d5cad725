"""`flexserve serve`: models over an OpenAI-compatible API."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..core import WorldStatus
from ..errors import KeyPermissions, KeyProblem, Usage
from ..sealed.files import opened
from ..worlds import WorldOptions, check_options, make_world
from ..worlds.base import ModelSource, World
from .budget import warn_of_silent
from .common import (
    FILE,
    Whole,
    device_key_option,
    human_bytes,
    passphrase_option,
    sigterm_interrupts,
    vendor_pub_option,
)
from .display import layout_note, note, printable, seconds, warn
from .sizes import Size
from .tuning import tuned
from .world_options import (
    admin_socket_option,
    model_source,
    no_copy_option,
    warn_of_long_context,
    world_options,
)

if TYPE_CHECKING:
    from ..server.gateway import Gateway
    from ..worlds.linux.users import Account

MIN_KEY_CHARS = 16
_NO_PATH = re.compile("(adapter|scale)=")
PROTECTION = {
    "linux": "linux world: weights, prompts and KV are kept from other users, core dumps and logs; "
    "not from root, nor from this user (docs/threat-model.md, `flexserve doctor`)",
    "fake": "fake world: NOTHING is protected, and answers are echoes",
}


class ModelOption(click.ParamType[Any]):
    """NAME=M.flex[,M.lic][,adapter=A.flex[,A.lic][,scale=S]], as the arguments of `model_source`."""

    name = "NAME=M.flex[,M.lic][,adapter=A.flex[,A.lic][,scale=S]]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        if not isinstance(value, str):
            return value
        name, equals, rest = value.partition("=")
        model, adapts, rest = rest.partition(",adapter=")
        adapter, scales, scale = rest.partition(",scale=")
        try:
            if not equals or not 1 <= len(name) <= 128:
                raise ValueError
            sealed, licence = _paths(model)
            added = (*_paths(adapter), float(scale) if scales else 1.0) if adapts else None
        except ValueError:
            self.fail(f"{value!r} is not of the form {self.name}", param, ctx)
        if not name.isprintable():
            self.fail(f"the name {name!r} has characters that cannot be printed", param, ctx)
        return name, sealed, licence, added


def _paths(text: str) -> tuple[Path, Path | None]:
    """M.flex[,M.lic]. Raises `ValueError`.

    A comma may be part of a path, as long as it cannot be that a part of the option is meant.
    """
    sealed, comma, licence = text.rpartition(",") if "," in text else (text, "", "")
    if not sealed or (comma and not licence) or _NO_PATH.match(licence) or ".flex," in sealed:
        raise ValueError
    return Path(sealed), Path(licence) if licence else None


@click.command("serve")
@click.option(
    "--model",
    "models",
    type=ModelOption(),
    required=True,
    multiple=True,
    help="A model to serve, and its name; with a sealed LoRA adapter, if wanted (docs/adapters.md). The licence: by "
    "default the .lic beside the .flex. Repeatable.",
)
@device_key_option(required=False)
@vendor_pub_option
@passphrase_option
@click.option(
    "--host", default="127.0.0.1", show_default=True, metavar="HOST", help="The address to listen on."
)
@click.option(
    "--port",
    type=Whole(0, 65535),
    default=8080,
    show_default=True,
    metavar="PORT",
    help="The port to listen on; 0: any free one.",
)
@click.option(
    "--allow-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="A host name clients may use for this server, besides IP addresses and localhost. Repeatable.",
)
@click.option(
    "--api-key-file",
    type=FILE,
    metavar="FILE",
    help="Answer only clients that send `Authorization: Bearer KEY` with the key in this file (0600).",
)
@click.option(
    "--user",
    metavar="NAME",
    help="As root: who the gateway becomes when it is ready. Default: `flexserve` if there is such a user, else a "
    "number nobody has.",
)
@click.option(
    "--session-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Save conversations' KV there, encrypted, so that they outlive a restart. Default: they are kept in memory.",
)
@click.option(
    "--budget",
    "budget_bytes",
    type=Size(),
    metavar="SIZE",
    help="How much memory the server may hold at the start: recalls lower it, offers raise it (docs/memory.md). "
    "Default: three quarters of the machine's memory.",
)
@click.option(
    "--hard",
    "hard_bytes",
    type=Size(),
    metavar="SIZE",
    help="The cap that no offer lifts the budget above. Default: three quarters of the machine's memory.",
)
@click.option(
    "--floor",
    "floor_bytes",
    type=Size(),
    metavar="SIZE",
    help="What no recall pushes the budget below. Default: 64M.",
)
@click.option(
    "--memory-manager/--no-memory-manager",
    default=True,
    show_default=True,
    help="Take memory back when the machine runs short of it, and give it when there is plenty (docs/memory.md).",
)
@click.option(
    "--lazy/--no-lazy",
    default=True,
    show_default=True,
    help="Hand idle weights to the kernel, which may then take them without a call. Until it does they stay readable "
    "to root (docs/threat-model.md).",
)
@click.option(
    "--prefetch/--no-prefetch",
    default=True,
    show_default=True,
    help="Load what the next request is expected to need while another one is answered (docs/workflows.md). Off, "
    "workflows are still learned.",
)
@click.option(
    "--pin",
    "pinned",
    multiple=True,
    metavar="NAME",
    help="Take this model's weights last when memory is wanted, and never give them to the kernel. Repeatable.",
)
@click.option(
    "--calibrate/--no-calibrate",
    default=True,
    show_default=True,
    envvar="FLEXSERVE_CALIBRATE",
    show_envvar=True,
    help="At the first start, measure for a second how many threads this machine and its storage need.",
)
@no_copy_option
@world_options
@admin_socket_option
def command(
    *,
    models: tuple[tuple[str, Path, Path | None, tuple[Path, Path | None, float] | None], ...],
    device_key: str | None,
    vendor_pub: Path | None,
    passphrase_file: Path | None,
    host: str,
    port: int,
    allowed_hosts: tuple[str, ...],
    api_key_file: Path | None,
    user: str | None,
    session_dir: Path | None,
    budget_bytes: int | None,
    hard_bytes: int | None,
    floor_bytes: int | None,
    memory_manager: bool,
    calibrate: bool,
    lazy: bool,
    prefetch: bool,
    pinned: tuple[str, ...],
    no_copy: bool,
    world_name: str,
    threads: int | None,
    load_workers: int | None,
    context_tokens: int | None,
    admin_socket: Path | None,
) -> None:
    """Serve models over an OpenAI-compatible API (docs/api.md) until Ctrl-C or SIGTERM."""
    from ..normal.manager import MemoryManager
    from ..server.admin import check_answers
    from ..server.bodies import BudgetBody
    from ..server.gate import HostRule
    from ..server.gateway import Gateway
    from ..server.listen import AdminSocket, default_admin_path, is_loopback, listen_tcp, url
    from ..server.serve import Server

    names = [name for name, *_ in models]
    if len(set(names)) < len(names):
        raise Usage("two models have the same name", hint="give each --model its own NAME=")
    for name in pinned:
        if name not in names:
            raise Usage(f"--pin {name!r} names none of the models", hint=f"there are {', '.join(names)}")
    sources = [model_source(*model, use_copy=not no_copy) for model in models]
    api_key = None if api_key_file is None else read_api_key(api_key_file)
    options = WorldOptions(
        device_key,
        vendor_pub,
        threads,
        context_tokens,
        passphrase_file,
        session_dir,
        load_workers,
        lazy,
        prefetch,
        tuple(dict.fromkeys(pinned)),
        budget_bytes,
        hard_bytes,
        floor_bytes,
    )
    account = _gateway_account(user)

    with ExitStack() as stack:
        # What is soon said first: a port in use should not be found out after calibrating and loading models.
        sock = stack.enter_context(listen_tcp(host, port))
        admin = stack.enter_context(closing(AdminSocket(admin_socket or default_admin_path())))
        stack.enter_context(sigterm_interrupts())  # until the server has its own signal handlers
        if world_name == "linux":
            _check_files(options, sources)
        sample = sources[0].sealed if calibrate and world_name == "linux" else None
        tuning = tuned(threads, load_workers, sample)
        options = replace(options, threads=tuning.threads, load_workers=tuning.load_workers)
        world = make_world(world_name, options)
        leave_root = _two_users(world, account)
        stack.enter_context(closing(world))
        world.start()
        gateway = Gateway(world)
        for source in sources:
            _register(gateway, source, context_tokens)
        leave_root()
        status = world.status()
        if (budget_bytes, hard_bytes) != (None, None) and status.budget is not None:
            check_answers(BudgetBody(budget_bytes, hard_bytes, floor_bytes), status)
            warn_of_silent(status.models, status.budget)
        loopback = is_loopback(sock)
        address = url(sock)

        def ready() -> None:
            _say_ready(address, names, status)
            if not loopback:
                _warn_open(address, has_key=api_key is not None)

        hosts = HostRule(loopback=loopback, names=allowed_hosts)
        manager = None
        if memory_manager:
            manager = stack.enter_context(closing(MemoryManager(world, note)))
            manager.start()
        Server(gateway, sock, hosts=hosts, admin=admin, api_key=api_key, manager=manager).run(ready)


def _check_files(options: WorldOptions, sources: Sequence[ModelSource]) -> None:
    """Refuse what the secure process would refuse at the first look, before anything is measured for it.

    Raises `Usage`, `NotFound`, `NotAuthentic`, `KeyProblem`, `StorageFailure`.
    """
    from ..sealed.keyfile import check_key_file
    from ..sealed.reader import read_manifest

    check_options("linux", options)
    assert options.device_key is not None
    check_key_file(options.device_key)
    for source in sources:
        for path in (source.sealed, *([source.adapter.sealed] if source.adapter else [])):
            with opened(path, "sealed model") as fd:
                read_manifest(fd)


def _gateway_account(name: str | None) -> Account | None:
    """Who the gateway is to become; None: nobody else. Raises `Usage`."""
    from ..worlds.linux.users import gateway_account, may_change_user

    if may_change_user():
        return gateway_account(name)
    if name is not None:
        raise Usage("--user is for a server that is started as root")
    return None


def _two_users(world: World, account: Account | None) -> Callable[[], None]:
    """Prepare the gateway to be somebody else than the secure process; returns what makes it so, when it is ready.

    Raises `EngineFailure`.
    """
    from ..worlds.linux.doctor import installed
    from ..worlds.linux.hardening import harden_gateway
    from ..worlds.linux.users import closed_to
    from ..worlds.linux.world import LinuxWorld

    harden_gateway()
    if account is None:
        return lambda: None
    closed = closed_to(installed(), account.uid)
    if not isinstance(world, LinuxWorld):
        return lambda: None
    if closed is not None:
        why = f"{closed} is closed to user {account.name}, who could not run FlexServe"
        return lambda: warn(f"the gateway stays root: {why}")
    world.start_through_another()

    def leave() -> None:
        world.leave_root(account.uid, account.gid)
        note(f"the gateway is user {account.name} now, and the secure process another")

    return leave


def read_api_key(path: Path) -> bytes:
    """The key in a file only this user can read. Raises `NotFound`, `KeyProblem`."""
    if path.exists() and not os.access(path, os.R_OK):
        raise KeyPermissions(f"you may not read {path}")
    with opened(path, "API key file") as fd:
        if stat.S_IMODE(os.fstat(fd).st_mode) & 0o077:
            raise KeyPermissions(f"{path} is open to other users", hint=f"chmod 600 {path}")
        key = os.read(fd, 4096).strip()
    if len(key) < MIN_KEY_CHARS or not key.isascii() or not key.decode().isprintable() or b" " in key:
        raise KeyProblem(
            f"{path} has no API key: one line of at least {MIN_KEY_CHARS} ASCII characters without spaces",
            hint="make one with `openssl rand -hex 32`",
        )
    return key


def _register(gateway: Gateway, source: ModelSource, context_tokens: int | None) -> None:
    before = time.monotonic()
    info = gateway.register(source)
    note(
        f"{source.name}: {printable(info.model_id)} version {info.model_version}, "
        f"{human_bytes(info.weight_bytes)}{', execution layout' if info.execution_layout else ''}"
        f"{f', adapter {printable(info.adapter)}' if info.adapter else ''}, "
        f"registered in {seconds(time.monotonic() - before)}"
    )
    if info.layout_hint:
        note(layout_note(info))
    warn_of_long_context(gateway.world, source, info, context_tokens)


def _say_ready(address: str, names: list[str], status: WorldStatus) -> None:
    click.echo(f"FlexServe is ready at {address} with {', '.join(names)}")
    note(f"protection: {PROTECTION[status.world]}")
    if status.flexmem.startswith("none") and status.world != "fake":
        warn(f"no Flex-Mem ({status.flexmem}): models are loaded fully before they compute")


def _warn_open(address: str, *, has_key: bool) -> None:
    warn(f"{address} is open to the network: prompts and answers cross it in clear")
    if not has_key:
        warn("everybody who reaches it may use it: give --api-key-file FILE")
