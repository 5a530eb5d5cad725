"""`flexserve inspect`: what a sealed model says about itself, with no secret key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..sealed.files import opened
from ..sealed.format import FORMAT_VERSION
from ..sealed.licence import utc
from ..sealed.reader import SignedManifest, read_manifest
from .common import FILE, human_bytes, human_count, print_json, trusted_vendors, vendor_pub_option


@click.command("inspect")
@click.argument("model", metavar="MODEL.flex", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="One JSON object (docs/schemas/inspect.json).")
@vendor_pub_option
def command(model: Path, as_json: bool, vendor_pub: Path | None) -> None:
    """Show what a sealed model says about itself, without any secret key.

    The signature is always checked. Whether the vendor is one to trust is shown, not required.
    """
    with opened(model, "sealed model") as fd:
        signed = read_manifest(fd)
    about = as_dict(signed, trusted=signed.vendor in trusted_vendors(vendor_pub))
    if as_json:
        print_json(about)
    else:
        _print(about)


def as_dict(signed: SignedManifest, *, trusted: bool) -> dict[str, Any]:
    """The object of docs/schemas/inspect.json."""
    m, d, plan = signed.manifest, signed.manifest.description, signed.manifest.plan
    return {
        "format_version": FORMAT_VERSION,
        "model_id": m.model_id,
        "model_version": m.model_version,
        "manifest_sha256": signed.digest.hex(),
        "sealing_id": m.sealing_id.hex(),
        "sealed_at": utc(m.sealed_at),
        "signature_valid": True,  # otherwise `read_manifest` raised
        "vendor_key_id": signed.vendor.key_id.hex(),
        "vendor_trusted": trusted,
        "is_adapter": m.is_adapter,
        "architecture": d.architecture,
        "quantization": d.quantization,
        "parameters": d.parameters,
        "layers": d.layers,
        "context_tokens": d.context_tokens,
        "tied_output": d.tied_output,
        "has_chat_template": d.has_chat_template,
        "tensors": len(m.tensors),
        "segments": plan.segment_count,
        "file_bytes": plan.file_bytes,
        "gguf_bytes": m.gguf_bytes,
        "image_bytes": plan.image_bytes,
        "regions": [
            {
                "kind": region.kind.name.lower(),
                "unit_bytes": region.unit_bytes,
                "length_bytes": region.length,
                "segments": region.segment_count,
                "first_segment": region.first_segment,
                "file_offset_bytes": region.file_offset,
                "image_offset_bytes": region.image_offset,
            }
            for region in plan.regions
        ],
    }


def _print(about: dict[str, Any]) -> None:
    yes = {True: "yes", False: "no"}
    trust = "trusted" if about["vendor_trusted"] else "NOT TRUSTED on this device"
    sizes = ", ".join(f"{r['kind']} {human_bytes(r['length_bytes'])}" for r in about["regions"])
    adapter = about["is_adapter"]
    kind = f"{about['architecture']}, {about['quantization']}, {human_count(about['parameters'])} parameters"
    model = {
        "context": f"{about['context_tokens']} tokens",
        "chat template": yes[about["has_chat_template"]],
        "tied output": yes[about["tied_output"]],
    }
    rows = {
        "model": f"{about['model_id']} version {about['model_version']}",
        "kind": f"LoRA adapter for {kind}" if adapter else f"{kind}, {about['layers']} layers",
        **({} if adapter else model),
        "signature": f"valid, by vendor {about['vendor_key_id']}",
        "vendor": trust,
        "sealed at": about["sealed_at"],
        "manifest": about["manifest_sha256"],
        "size": f"{human_bytes(about['file_bytes'])} in {about['segments']} segments ({sizes})",
    }
    for name, value in rows.items():
        click.echo(f"{name + ':':15}{value}")
