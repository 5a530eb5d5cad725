"""`flexserve license`: let one device use a sealed model."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from ..errors import StorageFailure, Usage, VendorNotTrusted
from ..sealed.files import opened, pwrite_all, replacing
from ..sealed.format import MAX_INTEGER, MAX_TIME
from ..sealed.keyfile import load_vendor_key
from ..sealed.keys import DevicePublicKey
from ..sealed.licence import NEVER, issue, utc
from ..sealed.reader import SealedModel
from ..sealed.trust import read_small
from .common import FILE, passphrase_option, passphrase_source


def parse_expiry(text: str) -> int:
    """Seconds since 1970 of the last valid second: a date means all of that day, UTC. Raises `Usage`."""
    try:
        moment = datetime.fromisoformat(text)
        if re.fullmatch(r"\d{4}-?\d{2}-?\d{2}|\d{4}-?W\d{2}-?\d", text):
            moment += timedelta(days=1, seconds=-1)
        seconds = int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        raise Usage(
            f"--expires {text!r} is not a date", hint="like 2027-12-31, or 2027-12-31T12:00:00Z"
        ) from None
    if not 0 <= seconds <= MAX_TIME:
        raise Usage(f"--expires {text!r} is before 1970 or after 9999")
    return seconds


@click.command("license")
@click.argument("model", metavar="MODEL.flex", type=FILE)
@click.option("-o", "--output", "out", type=FILE, required=True, metavar="FILE", help="The licence.")
@click.option("--vendor", type=FILE, required=True, metavar="FILE", help="The vendor's secret key.")
@click.option("--device", type=FILE, required=True, metavar="FILE", help="The device's public key.")
@click.option("--expires", metavar="DATE", help="Last valid day or moment, UTC. Default: never.")
@click.option("--serial", type=int, help="Must grow from licence to licence. Default: made from the time.")
@passphrase_option
def command(
    *,
    model: Path,
    out: Path,
    vendor: Path,
    device: Path,
    expires: str | None,
    serial: int | None,
    passphrase_file: Path | None,
) -> None:
    """Let one device use a sealed model."""
    now = time.time_ns()
    expires_at = NEVER if expires is None else parse_expiry(expires)
    if serial is not None and not 1 <= serial <= MAX_INTEGER:
        raise Usage(f"--serial {serial} must be 1 to {MAX_INTEGER}")
    key = load_vendor_key(vendor, passphrase_source(passphrase_file))
    device_pub = DevicePublicKey.from_pem(read_small(device), str(device))
    if device_pub.key_id == key.public.key_id:
        raise Usage(
            f"{device} is the vendor's own public key, not a device's",
            hint="`flexserve keys device` makes the device's, on the device; give its .pub file",
        )
    with opened(model, "sealed model") as fd:
        try:
            sealed = SealedModel.open(fd, [key.public])
        except VendorNotTrusted:  # whom this machine trusts has no part in it
            raise VendorNotTrusted(
                f"{model} was sealed with another vendor key than {vendor}",
                hint="give the key it was sealed with as --vendor, or seal the model again with this one",
            ) from None
        data = issue(
            sealed,
            key,
            device_pub,
            issued_at=now // 10**9,
            serial=now // 1000 if serial is None else serial,
            expires_at=expires_at,
        )
    if out.exists() and out.samefile(model):
        raise Usage(f"{out} is the sealed model itself", hint="give another name with -o")
    try:
        with replacing(out) as target:
            pwrite_all(target, data, 0)
    except OSError as error:
        raise StorageFailure(f"cannot write {out}: {error.strerror}") from error
    click.echo(
        f"{out}: {sealed.manifest.model_id} version {sealed.manifest.model_version} "
        f"for device {device_pub.key_id.hex()}, expires: {utc(expires_at)}"
    )
    if expires_at < now // 10**9:
        click.echo("warning: this licence has expired already", err=True)
