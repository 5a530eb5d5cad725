"""`flexserve optimize`: make the device's own copy of a sealed model, in the layout its processor computes with."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import NothingToRepack, Usage
from .common import (
    FILE,
    device_key_option,
    human_bytes,
    passphrase_option,
    print_json,
    progress_bar,
    sigterm_interrupts,
    vendor_pub_option,
)
from .world_options import model_source


@click.command("optimize")
@click.argument("model", metavar="MODEL.flex", type=FILE)
@click.option(
    "--license", "licence", type=FILE, metavar="M.lic", help="Default: the .lic file beside the model."
)
@device_key_option(required=True)
@vendor_pub_option
@passphrase_option
@click.option(
    "-o",
    "--output",
    "out",
    type=FILE,
    metavar="FILE",
    help="Default: the .flexcopy beside the model, where `run` and `serve` find it.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object (docs/schemas/optimize.json).")
def command(
    *,
    model: Path,
    licence: Path | None,
    device_key: str,
    vendor_pub: Path | None,
    passphrase_file: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Make this device's own copy of a sealed model, so that it starts and computes as fast as llama.cpp can.

    llama.cpp rearranges the weights of some quantisations for the processor (Q4_0, Q4_K, IQ4_NL and others) whenever
    it loads them. The copy has them so: encrypted anew, under a key that needs both this device and its licence.
    Where it rearranges none, no copy is made. The vendor's hashes are checked first. `run` and `serve` use the copy
    while it fits, and the sealed model, which they need in any case, otherwise.
    """
    import msgspec

    from ..sealed.device_copy import default_path
    from ..worlds.linux import LinuxWorld

    source = model_source(model.stem[:128], model, licence)
    target = out or default_path(model)
    for path in (source.sealed, source.licence):
        if target.exists() and target.samefile(path):
            raise Usage(f"{target} is needed as it is", hint="give another name with -o")
    world = LinuxWorld(device_key, vendor_pub=vendor_pub, threads=1, passphrase_file=passphrase_file)
    with sigterm_interrupts():
        try:
            world.start()
            with progress_bar("optimizing") as progress:
                info = world.optimize(source, target, progress)
        except NothingToRepack as none:  # as fast as can be: what was wanted is so already
            if as_json:
                print_json({"path": None, "why": none.message})
            else:
                click.echo(f"{none.message}: {none.hint}")
            return
        finally:
            world.close()
    if as_json:
        print_json({"path": str(target), **msgspec.to_builtins(info)})
        return
    second = ""
    if info.second_output_bytes:
        second = (
            f"; the embedding a second time ({human_bytes(info.second_output_bytes)}), as the output matrix"
        )
    click.echo(
        f"{target}: {info.model_id} version {info.model_version}, {human_bytes(info.file_bytes)}, "
        f"{info.repacked_tensors} of {info.tensors} tensors repacked ({human_bytes(info.repacked_bytes)}){second}"
    )
