"""`flexserve seal`: encrypt and sign a GGUF model, or a LoRA adapter for one."""

from __future__ import annotations

from pathlib import Path

import click

from ..engine.trial import try_model
from ..errors import Usage
from ..sealed.keyfile import load_vendor_key
from ..sealed.seal import seal
from .common import (
    FILE,
    human_bytes,
    passphrase_option,
    passphrase_source,
    progress_bar,
    sigterm_interrupts,
)
from .display import note


@click.command("seal")
@click.argument("model", metavar="MODEL.gguf", type=FILE)
@click.option("-o", "--output", "out", type=FILE, required=True, metavar="FILE", help="The sealed model.")
@click.option("--vendor", type=FILE, required=True, metavar="FILE", help="The vendor's secret key.")
@click.option("--id", "model_id", metavar="NAME", help="Model id. Default: made from the model's name.")
@click.option("--version", type=int, default=1, show_default=True, help="Devices refuse to go back to less.")
@click.option(
    "--force", is_flag=True, help="Replace a FILE that is there: its licences do not fit the new one."
)
@passphrase_option
def command(
    *,
    model: Path,
    out: Path,
    vendor: Path,
    model_id: str | None,
    version: int,
    force: bool,
    passphrase_file: Path | None,
) -> None:
    """Encrypt and sign a GGUF model, or a LoRA adapter for one (docs/adapters.md).

    Of a split model give the first part, NAME-00001-of-000NN.gguf.
    """
    if out.exists() and not force:
        raise Usage(
            f"{out} exists already",
            hint="give another name, or --force to replace it: its licences are useless then, and new ones needed",
        )
    key = load_vendor_key(vendor, passphrase_source(passphrase_file))
    with sigterm_interrupts(), progress_bar("sealing") as progress:
        manifest = seal(model, out, key, model_id, version, progress=progress, trial=_trial)
    click.echo(
        f"{out}: {manifest.model_id} version {manifest.model_version}, "
        f"{human_bytes(manifest.plan.file_bytes)} in {manifest.plan.segment_count} segments"
    )


def _trial(path: Path, architecture: str) -> None:
    try_model(path, architecture)
    note(
        f"architecture {architecture!r} has general rules only (docs/coverage.md): llama.cpp loaded the model in a "
        "trial; try it on a device before you ship it"
    )
