"""`flexserve run`: answer one prompt, or talk, with a sealed model of its own or one a server has."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Protocol

import click
from click.core import ParameterSource

from ..core import Finished, FinishReason, Message, Request, Sampling
from ..errors import (
    EngineFailure,
    FlexServeError,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    ServerNotFound,
    Usage,
)
from ..worlds import WorldOptions, make_world
from ..worlds.base import Generation, ModelSource
from .common import (
    FILE,
    device_key_option,
    passphrase_option,
    print_error,
    sigterm_interrupts,
    vendor_pub_option,
)
from .display import breakdown, layout_note, note, summary, write_answer
from .tuning import tuned
from .world_options import (
    adapter_options,
    admin_socket_option,
    model_source,
    no_copy_option,
    warn_of_long_context,
    world_options,
)

DEFAULTS = Sampling()
FILE_OPTIONS = {  # parameters that a server's model has had already, and their options
    "licence": "--license",
    "device_key": "--device-key",
    "vendor_pub": "--vendor-pub",
    "passphrase_file": "--passphrase-file",
    "copy": "--copy",
    "no_copy": "--no-copy",
    "world_name": "--world",
    "threads": "--threads",
    "load_workers": "--load-workers",
    "context_tokens": "--context",
}
EXIT_INTERRUPTED = 130  # as shells report SIGINT


class Answerer(Protocol):
    """A world or a server."""

    def generate(self, request: Request) -> Generation: ...


@dataclass(frozen=True)
class _Started:
    """Something that answers, under which model name, and what starting it took."""

    answerer: Answerer
    model: str
    start_s: float = 0.0
    register_s: float = 0.0


@dataclass(frozen=True)
class _Settings:
    """What every request of this call has in common."""

    max_tokens: int | None
    stop: tuple[str, ...]
    sampling: Sampling
    system: str | None
    raw: bool
    verbose: bool
    session: str | None = None


@click.command("run")
@click.argument("model", metavar="MODEL")
@click.argument("prompt", required=False)
@click.option(
    "--license", "licence", type=FILE, metavar="M.lic", help="Default: the .lic file beside the model."
)
@device_key_option(required=False)
@vendor_pub_option
@passphrase_option
@click.option("--raw", is_flag=True, help="Take the prompt as it is, without the model's chat template.")
@click.option("--system", metavar="TEXT", help="A system message before the prompt.")
@click.option(
    "--temperature",
    type=float,
    metavar="T",
    default=DEFAULTS.temperature,
    show_default=True,
    help="0: greedy.",
)
@click.option(
    "--top-k",
    type=int,
    metavar="K",
    default=DEFAULTS.top_k,
    show_default=True,
    help="The K likeliest; 0: off.",
)
@click.option(
    "--top-p", type=float, metavar="P", default=DEFAULTS.top_p, show_default=True, help="Nucleus; 1: off."
)
@click.option(
    "--min-p",
    type=float,
    metavar="P",
    default=DEFAULTS.min_p,
    show_default=True,
    help="At least P of the likeliest; 0: off.",
)
@click.option(
    "--repeat-penalty",
    type=float,
    metavar="R",
    default=DEFAULTS.repeat_penalty,
    show_default=True,
    help="Over the last 64 tokens; 1: off.",
)
@click.option("--seed", type=int, metavar="N", help="Makes sampling repeatable. Default: a fresh one.")
@click.option("--max-tokens", type=int, metavar="N", help="Default: as many as fit the context.")
@click.option(
    "--session",
    metavar="NAME",
    help="With a server: the conversation this belongs to, of which it keeps only the newest state.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text. Repeatable.")
@click.option(
    "--copy",
    "copy",
    type=FILE,
    metavar="FILE",
    help="The device's own copy of the model (`flexserve optimize`). Default: the .flexcopy beside it.",
)
@no_copy_option
@adapter_options
@world_options
@admin_socket_option
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object (docs/schemas/run.json), not streamed."
)
@click.option("--verbose", is_flag=True, help="Show where the time went, line by line.")
def command(
    *,
    model: str,
    prompt: str | None,
    licence: Path | None,
    device_key: str | None,
    vendor_pub: Path | None,
    passphrase_file: Path | None,
    raw: bool,
    system: str | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repeat_penalty: float,
    seed: int | None,
    max_tokens: int | None,
    session: str | None,
    stop: tuple[str, ...],
    copy: Path | None,
    no_copy: bool,
    adapter: tuple[Path, Path | None, float] | None,
    world_name: str,
    threads: int | None,
    load_workers: int | None,
    context_tokens: int | None,
    admin_socket: Path | None,
    as_json: bool,
    verbose: bool,
) -> int:
    """Answer PROMPT with MODEL; without PROMPT, talk (on a terminal) or read the prompt from stdin.

    MODEL is a sealed model file, started for this call, or the name of a model that a running server has.
    The answer goes to stdout as it comes, a line about its times to stderr.
    """
    if no_copy and copy is not None:
        raise Usage("--copy and --no-copy exclude each other")
    if raw and system is not None:
        raise Usage("--raw has no place for a system message", hint="leave out --raw or --system")
    sampling = Sampling(temperature, top_k, top_p, min_p, repeat_penalty, seed)
    settings = _Settings(max_tokens, stop, sampling, system, raw, verbose, session)
    text = prompt_text(prompt)
    if text is None and (as_json or raw):
        raise Usage(f"{'--json' if as_json else '--raw'} needs a prompt", hint="give one, or pipe it in")
    _request(settings, "check", _turn(settings, text or "x"))  # refuse bad values before starting anything

    with sigterm_interrupts():
        if is_file(model):
            if session is not None:
                raise Usage(
                    "--session is for a server's model: one that is started for this call ends with it",
                    hint="leave it out, or start `flexserve serve` and give the model's name",
                )
            options = WorldOptions(
                device_key,
                vendor_pub,
                threads,
                context_tokens,
                passphrase_file,
                load_workers=load_workers,
            )
            path = Path(model)
            source = model_source(path.stem[:128], path, licence, adapter, copy=copy, use_copy=not no_copy)
            opened = own_world(world_name, options, source)
        else:
            check_no_file_options(adapter, given_options(FILE_OPTIONS))
            opened = opened_server(model, admin_socket)
        with opened as started:
            if text is None:
                return _talk(started, settings)
            return _answer_once(started, settings, text, as_json=as_json)


def given_options(names: Mapping[str, str]) -> list[str]:
    """Of those parameters, the options that stand on this command line (not in the environment)."""
    context = click.get_current_context()
    return [
        option
        for name, option in names.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]


def check_no_file_options(adapter: object, given: Sequence[str]) -> None:
    """Raises `Usage` for what only the start of a model can do, where a server has started it."""
    if given:
        raise Usage(
            f"{' and '.join(given)}: only for a sealed model file, not for a server's model",
            hint="leave it out, or give a .flex file; a server is told when it is started (`flexserve serve --help`)",
        )
    if adapter is not None:
        raise Usage(
            "--adapter goes with a sealed model file, not with a server's model",
            hint="start the server with it: serve --model NAME=M.flex,adapter=A.flex",
        )


def is_file(model: str) -> bool:
    """Raises `Usage` for a directory."""
    if Path(model).is_dir():
        raise Usage(f"{model} is a directory", hint="give the .flex file, or the name of a server's model")
    return "/" in model or model.endswith(".flex") or Path(model).exists()


def prompt_text(argument: str | None) -> str | None:
    """The prompt given or piped in; None: there is a terminal to talk on. Raises `Usage`."""
    if argument is None and sys.stdin.isatty():
        return None
    if argument is None or argument == "-":
        try:
            text = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError:
            raise Usage("the prompt on stdin is not UTF-8") from None
        text = text.removesuffix("\n")
    else:
        text = argument
        if any("\ud800" <= c <= "\udfff" for c in text):  # how Python passes on other bytes
            raise Usage("the prompt is not UTF-8")
    if not text:
        raise Usage("the prompt is empty", hint="give it as an argument, or pipe it in")
    return text


@contextmanager
def own_world(world_name: str, options: WorldOptions, source: ModelSource) -> Iterator[_Started]:
    """A world for this call, with the model registered; with as many threads as were calibrated, where `options` do not
    say."""
    tuning = tuned(options.threads, options.load_workers, None)
    world = make_world(world_name, replace(options, threads=tuning.threads, load_workers=tuning.load_workers))
    try:
        begun = time.monotonic()
        world.start()
        started = time.monotonic()
        info = world.register(source)
        registered = time.monotonic()
        if info.layout_hint:
            note(layout_note(info))
        warn_of_long_context(world, source, info, options.context_tokens)
        yield _Started(world, source.name, started - begun, registered - started)
    finally:
        world.close()


@contextmanager
def opened_server(name: str, admin_socket: Path | None) -> Iterator[_Started]:
    """The running server, if it has the model."""
    from ..server.client import ServerClient

    try:
        client = ServerClient(admin_socket)
    except ServerNotFound as error:
        raise NotFound(
            f"{name!r} is no file, and {error.message}", hint="give a .flex file, or start `flexserve serve`"
        ) from None
    names = [info.name for info in client.models()]
    if name not in names:
        raise ModelNotFound(f"{name!r} is no file, and the server has only {', '.join(names)}")
    yield _Started(client, name)


def _turn(settings: _Settings, text: str, history: tuple[Message, ...] = ()) -> tuple[Message, ...] | str:
    if settings.raw:
        return text
    system = (Message("system", settings.system),) if settings.system is not None else ()
    return (*system, *history, Message("user", text))


_numbers = itertools.count(1)


def _request(settings: _Settings, model: str, prompt: tuple[Message, ...] | str) -> Request:
    return Request(
        id=f"run-{next(_numbers)}",
        model=model,
        messages=None if isinstance(prompt, str) else prompt,
        prompt=prompt if isinstance(prompt, str) else None,
        max_tokens=settings.max_tokens,
        stop=settings.stop,
        sampling=settings.sampling,
        session=settings.session,
    )


def read_answer(answerer: Answerer, request: Request, show: Callable[[str], None]) -> Finished:
    """The whole answer, shown piece by piece. Ctrl-C cancels it, and again gives up waiting for its end."""
    generation = answerer.generate(request)
    shown = 0
    try:
        with _ctrl_c(generation.cancel):
            for event in generation:
                show(event.text[shown:] if isinstance(event, Finished) else event.text)
                if isinstance(event, Finished):
                    return event
                shown += len(event.text)
    except BaseException:
        generation.cancel()
        raise
    raise EngineFailure("the answer ended without saying why")


@contextmanager
def _ctrl_c(cancel: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `cancel` once, then raises KeyboardInterrupt.

    Not by catching KeyboardInterrupt: that may be raised between any two steps of reading an answer.
    """
    pressed = False

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        # In a thread: the one interrupted here may hold a lock that `cancel` needs.
        threading.Thread(target=cancel, daemon=True).start()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _answer_once(started: _Started, settings: _Settings, text: str, *, as_json: bool) -> int:
    """The exit code: 0, or 130 after Ctrl-C."""
    request = _request(settings, started.model, _turn(settings, text))
    finished = read_answer(started.answerer, request, (lambda _: None) if as_json else write_answer)
    cancelled = finished.finish_reason == FinishReason.CANCELLED
    if as_json:
        import msgspec

        shown = msgspec.to_builtins(finished)
        del shown["embedding"]  # `flexserve embed` is for those
        click.echo(msgspec.json.encode(shown))  # one line: a token id on each would bury the rest
    elif not finished.text.endswith("\n"):
        write_answer("\n")
    _note_times(started, settings, finished, first=True)
    return EXIT_INTERRUPTED if cancelled else 0


def _note_times(started: _Started, settings: _Settings, finished: Finished, *, first: bool) -> None:
    if settings.verbose and finished.finish_reason != FinishReason.CANCELLED:
        start_s, register_s = (started.start_s, started.register_s) if first else (0.0, 0.0)
        note(breakdown(finished.timings, start_s=start_s, register_s=register_s))
    else:
        note(f"[{summary(finished)}]")


def _talk(started: _Started, settings: _Settings) -> int:
    """A conversation on the terminal. It is kept in memory only: no history file."""
    import readline  # noqa: F401  # gives input() line editing

    note(f"{started.model}: Ctrl-C stops an answer, /clear forgets the conversation, /exit or Ctrl-D ends")
    history: tuple[Message, ...] = ()
    first = True
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            click.echo()
            return 0
        except KeyboardInterrupt:
            click.echo()
            continue
        except UnicodeDecodeError:
            print_error(InvalidRequest("that line is not UTF-8"))
            continue
        if text == "/exit":
            return 0
        if text == "/clear":
            history = ()
            note("forgotten")
            continue
        if not text:
            continue
        if text.startswith("/") and " " not in text:
            note("there are /clear and /exit")
            continue
        try:
            turn = _turn(settings, text, history)
            finished = read_answer(started.answerer, _request(settings, started.model, turn), write_answer)
        except FlexServeError as error:
            click.echo()
            print_error(error)
            continue
        write_answer("\n")
        _note_times(started, settings, finished, first=first)
        first = False
        if finished.text:  # a turn cancelled before its answer began never happened
            history += (Message("user", text), Message("assistant", finished.text))
