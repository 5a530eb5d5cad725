"""`flexserve embed`: embeddings of texts, with a sealed model of its own or one a server has."""

from __future__ import annotations

import struct
from pathlib import Path

import click

from ..core import Finished, FinishReason, Request
from ..errors import Usage
from ..worlds import WorldOptions
from .common import FILE, device_key_option, passphrase_option, sigterm_interrupts, vendor_pub_option
from .run import (
    EXIT_INTERRUPTED,
    FILE_OPTIONS,
    check_no_file_options,
    given_options,
    is_file,
    opened_server,
    own_world,
    prompt_text,
    read_answer,
)
from .world_options import adapter_options, admin_socket_option, model_source, world_options


@click.command("embed")
@click.argument("model", metavar="MODEL")
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option(
    "--license", "licence", type=FILE, metavar="M.lic", help="Default: the .lic file beside the model."
)
@device_key_option(required=False)
@vendor_pub_option
@passphrase_option
@adapter_options
@world_options
@admin_socket_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object (docs/schemas/embed.json).")
def command(
    *,
    model: str,
    texts: tuple[str, ...],
    licence: Path | None,
    device_key: str | None,
    vendor_pub: Path | None,
    passphrase_file: Path | None,
    adapter: tuple[Path, Path | None, float] | None,
    world_name: str,
    threads: int | None,
    load_workers: int | None,
    context_tokens: int | None,
    admin_socket: Path | None,
    as_json: bool,
) -> int:
    """Make an embedding of each TEXT with MODEL; without TEXT, of what is on stdin.

    MODEL is a sealed model file, started for this call, or the name of a model that a running server has. An
    embedding is a JSON array of numbers, one line for each text; as a vector its length is 1, so that the dot
    product of two says how alike the texts are.
    """
    given = [text for one in texts or (None,) if (text := prompt_text(one)) is not None]
    if not given:
        raise Usage("there is no text", hint="give one, or pipe it in")
    with sigterm_interrupts():
        if is_file(model):
            path = Path(model)
            options = WorldOptions(
                device_key,
                vendor_pub,
                threads,
                context_tokens,
                passphrase_file,
                load_workers=load_workers,
            )
            source = model_source(path.stem[:128], path, licence, adapter, use_copy=False)
            opened = own_world(world_name, options, source)
        else:
            check_no_file_options(adapter, given_options(FILE_OPTIONS))
            opened = opened_server(model, admin_socket)
        with opened as started:
            made: list[Finished] = []
            for i, text in enumerate(given):
                request = Request(id=f"embed-{i}", model=started.model, prompt=text, embed=True)
                made.append(read_answer(started.answerer, request, lambda _: None))
                if made[-1].finish_reason == FinishReason.CANCELLED:
                    return EXIT_INTERRUPTED
                if not as_json:
                    click.echo(_line(made[-1].embedding))
            if as_json:
                click.echo(_object(started.model, made))
    return 0


def _numbers(embedding: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(embedding) // 4}f", embedding))


def _line(embedding: bytes) -> bytes:
    import msgspec

    return msgspec.json.encode(_numbers(embedding))


def _object(model: str, made: list[Finished]) -> bytes:
    import msgspec

    return msgspec.json.encode(
        {
            "model": model,
            "embeddings": [_numbers(f.embedding) for f in made],
            "timings": [f.timings for f in made],
        }
    )
