"""The worlds: one way each to have a normal world, a secure world and a monitor between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import Budget
from ..errors import InvalidRequest, Usage

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
    budget_bytes: int | None = None  # the budget at the start, and the limits it moves between
    hard_bytes: int | None = None
    floor_bytes: int | None = None

    def limits(self, usual: Budget) -> Budget:
        """`usual` with what is said here, by the rules of `World.budget`. Raises `InvalidRequest`."""
        soft = usual.soft_bytes if self.budget_bytes is None else self.budget_bytes
        hard = usual.hard_bytes if self.hard_bytes is None else self.hard_bytes
        floor = usual.floor_bytes if self.floor_bytes is None else self.floor_bytes
        if floor > hard:
            raise InvalidRequest(
                f"the floor of {floor} bytes is above the hard cap of {hard} bytes",
                hint="lower --floor, or raise --hard",
            )
        return Budget(max(floor, min(soft, hard)), hard, floor, 0)


def check_options(name: str, options: WorldOptions) -> None:
    """What `make_world` would refuse, without making one. Raises `Usage`, `InvalidRequest`."""
    if name == "linux":
        from .linux.configured import limited

        if options.device_key is None:
            raise Usage("the linux world needs a device key", hint="give --device-key FILE")
        limited(options)


def make_world(name: str, options: WorldOptions) -> World:
    """The world of that name, not started. Raises `Usage`, `InvalidRequest`."""
    if name == "linux":
        from .linux import LinuxWorld
        from .linux.configured import limited

        check_options(name, options)
        assert options.device_key is not None
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
            settings=limited(options),
        )
    if name == "fake":
        from ..engine.fake import FakeEngine, SystemClock
        from .fake import BUDGET, FakeWorld

        engine = FakeEngine(clock=SystemClock(), prefill_s=0.05, token_s=0.01)
        return FakeWorld(engine, budget=options.limits(BUDGET))
    raise Usage(f"no world is called {name!r}", hint=f"one of {', '.join(WORLD_NAMES)}")
