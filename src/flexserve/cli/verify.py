"""`flexserve verify`: check every byte of a sealed model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from ..errors import SegmentNotAuthentic, Usage
from ..sealed import statefile
from ..sealed.files import opened
from ..sealed.keyfile import load_device_key
from ..sealed.licence import open_licence
from ..sealed.reader import SealedModel, UnlockedModel
from ..sealed.verify import Report, verify
from .common import (
    FILE,
    device_key_option,
    human_bytes,
    passphrase_option,
    passphrase_source,
    print_json,
    progress_bar,
    read_licence,
    trusted_vendors,
    vendor_pub_option,
)

SHOWN = 20


@click.command("verify")
@click.argument("model", metavar="MODEL.flex", type=FILE)
@click.option("--license", "licence", type=FILE, metavar="FILE", help="The licence of this device.")
@device_key_option(required=False)
@vendor_pub_option
@passphrase_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object (docs/schemas/verify.json).")
def command(
    *,
    model: Path,
    licence: Path | None,
    device_key: str | None,
    vendor_pub: Path | None,
    passphrase_file: Path | None,
    as_json: bool,
) -> None:
    """Check every byte of a sealed model; exit 0 only if every segment is authentic.

    With a licence and the device's key: signature, licence, every hash, every tag, and that the model inside
    is consistent. Without: signature and every hash, which finds every changed byte too, but does not show
    that the licence opens the model.
    """
    if (licence is None) != (device_key is None):
        raise Usage(
            "--license and --device-key go together", hint="give both, or none to check without a key"
        )
    with opened(model, "sealed model") as fd:
        sealed = SealedModel.open(fd, trusted_vendors(vendor_pub))
        unlocked = None
        if licence is not None and device_key is not None:
            unlocked = _unlock(sealed, licence, device_key, passphrase_file)
        with progress_bar("verifying") as progress:
            report = verify(sealed, unlocked, progress=progress)
    if as_json:
        print_json(as_dict(sealed, report))
    else:
        _print(model, sealed, report)
    if not report.authentic:
        raise SegmentNotAuthentic(
            f"{len(report.bad)} of {report.segments} segments of {model} are not authentic",
            hint="the file changed after sealing or its storage is failing: get it from its vendor again",
        )


def _unlock(
    sealed: SealedModel, licence: Path, device_key: str, passphrase_file: Path | None
) -> UnlockedModel:
    device = load_device_key(device_key, passphrase_source(passphrase_file))
    data = read_licence(licence)
    path = statefile.state_path(device.key_id)
    with statefile.locked(path):
        model_key, state = open_licence(data, sealed, device, statefile.load(path), time.time())
        statefile.store(path, state)
    return sealed.unlock(model_key)


def as_dict(sealed: SealedModel, report: Report) -> dict[str, Any]:
    """The object of docs/schemas/verify.json."""
    return {
        "authentic": report.authentic,
        "model_id": sealed.manifest.model_id,
        "model_version": sealed.manifest.model_version,
        "manifest_sha256": sealed.digest.hex(),
        "vendor_key_id": sealed.vendor.key_id.hex(),
        "checked": "hashes_and_tags" if report.tags_checked else "hashes",
        "segments": report.segments,
        "checked_bytes": report.checked_bytes,
        "bad_segments": [
            {
                "index": bad.segment.index,
                "region": bad.segment.kind.name.lower(),
                "file_offset_bytes": bad.segment.file_offset,
                "length_bytes": bad.segment.length,
                "problem": bad.problem,
                "tensors": list(bad.tensors),
            }
            for bad in report.bad
        ],
    }


def _print(model: Path, sealed: SealedModel, report: Report) -> None:
    for bad in report.bad[:SHOWN]:
        tensors = f", tensors {', '.join(bad.tensors)}" if bad.tensors else ""
        where = f"{bad.segment.kind.name.lower()}, bytes {bad.segment.file_offset} to "
        end = bad.segment.file_offset + bad.segment.length
        click.echo(f"segment {bad.segment.index} ({where}{end}): wrong {_PROBLEMS[bad.problem]}{tensors}")
    if len(report.bad) > SHOWN:
        click.echo(f"and {len(report.bad) - SHOWN} more")
    if report.authentic:
        what = "hash and tag" if report.tags_checked else "hash (no key given, so no tag was checked)"
        click.echo(
            f"{model}: authentic. {sealed.manifest.model_id} version {sealed.manifest.model_version}, "
            f"{report.segments} segments, {human_bytes(report.checked_bytes)}: checked every {what}"
        )


_PROBLEMS = {"unreadable": "size or unreadable", "hash": "hash", "tag": "tag"}
