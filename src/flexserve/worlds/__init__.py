"""The worlds: one way each to have a normal world, a secure world and a monitor between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Usage

if TYPE_CHECKING:
    from .base import World

WORLD_NAMES = ("linux", "fake")


@dataclass(frozen=True)
class WorldOptions:
    """What the command line says about a world, whichever it is. None: the world's default."""

    device_key: str | None = None
    vendor_pub: Path | None = None
    threads: int | None = None
    context_tokens: int | None = None
    passphrase_file: Path | None = None
    session_dir: Path | None = None  # None: conversations are not saved
    load_workers: int | None = None
    lazy: bool = True  # hand idle weights to the kernel lazily
    prefetch: bool = True  # load what the next request needs before it comes
    pinned: tuple[str, ...] = ()  # names of models whose weights go last


def make_world(name: str, options: WorldOptions) -> World:
    """The world of that name, not started. Raises `Usage`."""
    if name == "linux":
        from .linux import LinuxWorld

        if options.device_key is None:
            raise Usage("the linux world needs a device key", hint="give --device-key FILE")
        return LinuxWorld(
            options.device_key,
            vendor_pub=options.vendor_pub,
            threads=options.threads,
            load_workers=options.load_workers,
            context_tokens=options.context_tokens,
            passphrase_file=options.passphrase_file,
            session_dir=options.session_dir,
            lazy=options.lazy,
            prefetch=options.prefetch,
            pinned=options.pinned,
        )
    if name == "fake":
        from ..engine.fake import FakeEngine, SystemClock
        from .fake import FakeWorld

        return FakeWorld(FakeEngine(clock=SystemClock(), prefill_s=0.05, token_s=0.01))
    raise Usage(f"no world is called {name!r}", hint=f"one of {', '.join(WORLD_NAMES)}")
