"""`flexserve keys`: make keys, and say which vendors this device trusts."""

from __future__ import annotations

from pathlib import Path

import click

from ..sealed.keyfile import write_key
from ..sealed.keys import DeviceKey, VendorKey
from ..sealed.trust import TrustStore, read_public_key
from .common import FILE, new_passphrase


@click.group("keys")
def command() -> None:
    """Make vendor and device keys; manage trusted vendors."""


def _make(
    kind: type[VendorKey] | type[DeviceKey], out: Path, ask: bool, passphrase_file: Path | None
) -> None:
    key = kind.generate()
    files = write_key(out, key, new_passphrase(ask, passphrase_file))
    click.echo(f"{files.secret}: secret, keep it")
    click.echo(f"{files.public}: public, id {key.public.key_id.hex()}")


_out = click.option("-o", "--output", "out", type=FILE, required=True, metavar="FILE", help="New secret key.")
_ask = click.option("--passphrase", "ask", is_flag=True, help="Protect it with a passphrase; asks for one.")
_file = click.option(
    "--passphrase-file", type=FILE, metavar="FILE", help="Protect it with the first line of this file."
)


@command.command()
@_out
@_ask
@_file
def vendor(out: Path, ask: bool, passphrase_file: Path | None) -> None:
    """Make a vendor's key pair: FILE and FILE.pub (vendor.key, vendor.pub)."""
    _make(VendorKey, out, ask, passphrase_file)


@command.command()
@_out
@_ask
@_file
def device(out: Path, ask: bool, passphrase_file: Path | None) -> None:
    """Make a device's key pair: FILE and FILE.pub (device.key, device.pub)."""
    _make(DeviceKey, out, ask, passphrase_file)


@command.command()
@click.argument("vendor_pub", type=FILE)
def trust(vendor_pub: Path) -> None:
    """Trust the models of this vendor on this device."""
    key = read_public_key(vendor_pub)
    TrustStore().trust(key)
    click.echo(f"trusted: vendor {key.key_id.hex()}")


@command.command()
def trusted() -> None:
    """List the ids of trusted vendors."""
    for key in TrustStore().vendors():
        click.echo(key.key_id.hex())


@command.command()
@click.argument("key_id", metavar="ID")
def distrust(key_id: str) -> None:
    """Trust a vendor no longer. ID is its id, or the first 8 digits or more of it."""
    click.echo(f"no longer trusted: vendor {TrustStore().distrust(key_id.lower())}")
