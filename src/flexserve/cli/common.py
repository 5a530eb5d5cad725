"""What several verbs share: how errors and sizes look, the options for keys and trust, progress on stderr."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import FlexServeError, StorageFailure, Usage
from ..sealed.files import opened

if TYPE_CHECKING:  # `flexserve --help` imports this file, and no cryptography
    from ..sealed.keyfile import Passphrase
    from ..sealed.keys import VendorPublicKey

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path, dir_okay=False)
SAME_SIGNAL_S = 2.0


class Whole(click.IntRange):
    """A whole number between limits; click would call other text "not a valid integer range"."""

    name = "integer"


def print_error(error: FlexServeError) -> None:
    """`error: message (code)` and `hint: ...`, on stderr."""
    click.echo(f"error: {error.message} ({error.code})", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(value, indent=2))


def human_bytes(count: int) -> str:
    """`17 B`, `3.2 MB`: decimal units, as storage is sold."""
    if count < 1000:
        return f"{count} B"
    size = float(count)
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} TB"


def human_count(count: int) -> str:
    """`1.2B`: parameters as models are called."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.1f}{unit}"
    return str(count)


def read_licence(path: Path) -> bytes:
    """A licence file's content; too long a file is cut one byte after a licence's size, and refused there."""
    with opened(path, "licence") as fd:
        try:
            return os.read(fd, 361)
        except OSError as error:
            raise StorageFailure(f"cannot read {path}: {error.strerror}") from error


def vendor_pub_option(function: F) -> F:
    """`--vendor-pub FILE`, argument `vendor_pub`."""
    return click.option(
        "--vendor-pub", type=FILE, metavar="FILE", help="Trust exactly this vendor, for this call."
    )(function)


def device_key_option(*, required: bool) -> Callable[[F], F]:
    """`--device-key SOURCE`, argument `device_key`."""
    return click.option(
        "--device-key",
        metavar="SOURCE",
        required=required,
        envvar="FLEXSERVE_DEVICE_KEY",
        show_envvar=True,
        help="The device's secret key: a file, or credential:NAME in a systemd service.",
    )


def passphrase_option(function: F) -> F:
    """`--passphrase-file FILE`, argument `passphrase_file`."""
    return click.option(
        "--passphrase-file", type=FILE, metavar="FILE", help="Its first line opens a protected key."
    )(function)


def trusted_vendors(vendor_pub: Path | None) -> tuple[VendorPublicKey, ...]:
    """The one vendor given, or those in the trust store."""
    from ..sealed.trust import TrustStore, read_public_key

    return (read_public_key(vendor_pub),) if vendor_pub is not None else TrustStore().vendors()


def passphrase_source(file: Path | None) -> Passphrase | None:
    """How to get the passphrase of a protected key: from the file, else by asking on a terminal."""
    from ..sealed.keyfile import read_passphrase_file

    if file is not None:
        return lambda _source: read_passphrase_file(file)
    if not sys.stdin.isatty():
        return None

    def ask(source: str) -> bytes:
        answer: str = click.prompt(f"passphrase of {source}", hide_input=True, err=True)
        return answer.encode()

    return ask


def new_passphrase(ask: bool, file: Path | None) -> bytes | None:
    """The passphrase for a new key; None: an unprotected one. Raises `Usage`."""
    from ..sealed.keyfile import read_passphrase_file

    if ask and file is not None:
        raise Usage("--passphrase and --passphrase-file exclude each other")
    if file is not None:
        return read_passphrase_file(file)
    if not ask:
        return None
    if not sys.stdin.isatty():
        raise Usage("there is no terminal to ask for a passphrase on", hint="give --passphrase-file")
    answer: str = click.prompt("passphrase", hide_input=True, confirmation_prompt=True, err=True)
    return answer.encode()


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """A function to call with (bytes done, bytes in total), or None when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    width = 30

    def show(done: int, total: int) -> None:
        filled = width * done // total if total else width
        bar = "#" * filled + "." * (width - filled)
        click.echo(f"\r{label} [{bar}] {human_bytes(done)} of {human_bytes(total)}  ", err=True, nl=False)

    try:
        yield show
    finally:
        click.echo("\r\x1b[K", err=True, nl=False)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that half-written files are removed.

    One that comes again at once is the same: `timeout` sends it to a process and then to its group, and cleaning up
    must not end at that.
    """
    came_at = -math.inf

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal came_at
        if time.monotonic() - came_at >= SAME_SIGNAL_S:
            came_at = time.monotonic()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except Exception as error:
        if came_at > 0:  # whatever fails then, fails because of it
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def was_interrupted(error: BaseException) -> bool:
    """Whether an error came up while Ctrl-C or SIGTERM was being obeyed."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        if isinstance(at, KeyboardInterrupt):
            return True
        seen.add(id(at))
        at = at.__context__
    return False
