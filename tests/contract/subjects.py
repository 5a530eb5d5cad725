"""The worlds under contract: how to start each one on this machine, and how to make it fail.

To put another world under contract, write one function like `fake_subject` and add it to `SUBJECTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flexserve.engine.fake import FakeEngine, SystemClock
from flexserve.errors import (
    FlexServeError,
    LicenceMalformed,
    LicenceWrongDevice,
    LicenceWrongModel,
    NotFound,
    SealedMalformed,
    VendorNotTrusted,
)
from flexserve.sealed.keys import DeviceKey
from flexserve.worlds.base import ModelSource, World
from flexserve.worlds.fake import FakeWorld, write_fake_model

from ..sealed_fixtures import TINY, license_for
from ..world_fixtures import DEMO, kill, linux_world, make_device


@dataclass
class Subject:
    """A started world and what the suite needs to know about it.

    `source`: a good model, not registered yet, whose context holds at least 512 tokens.
    `refused`: sources that must not be registered, each with the error that says why.
    `crash`: make the secure world die now.
    """

    world: World
    source: ModelSource
    refused: dict[str, tuple[ModelSource, type[FlexServeError]]] = field(default_factory=dict)
    crash: Callable[[], None] = lambda: None


@contextmanager
def fake_subject(directory: Path) -> Iterator[Subject]:
    # 2 ms per token: slow enough that a test can cancel an answer while it is computed.
    world = FakeWorld(FakeEngine(clock=SystemClock(), token_s=0.002))
    good = write_fake_model(directory, "good", context_tokens=2048)
    junk = directory / "junk"
    junk.write_bytes(b"\0" * 4096)
    other = write_fake_model(directory, "other-device", device="another device")
    refused: dict[str, tuple[ModelSource, type[FlexServeError]]] = {
        "no model file": (ModelSource("m", directory / "absent.flex", good.licence), NotFound),
        "no licence file": (ModelSource("m", good.sealed, directory / "absent.lic"), NotFound),
        "model is junk": (ModelSource("m", junk, good.licence), SealedMalformed),
        "licence is junk": (ModelSource("m", good.sealed, junk), LicenceMalformed),
        "unknown vendor": (write_fake_model(directory, "foreign", vendor="nobody"), VendorNotTrusted),
        "other device": (other, LicenceWrongDevice),
        "other model": (ModelSource("m", other.sealed, good.licence), LicenceWrongModel),
    }
    world.start()
    try:
        yield Subject(world, good, refused, world.crash)
    finally:
        world.close()


@contextmanager
def linux_subject(directory: Path) -> Iterator[Subject]:
    """The demo model in the linux world: real text, so that stop strings have something to find."""
    device = make_device(directory / "device")
    good = device.add("good", DEMO)
    junk = directory / "junk"
    junk.write_bytes(b"\0" * 4096)
    foreign = make_device(directory / "foreign").add("foreign", DEMO)
    other, _ = device.add_kit("other", TINY)
    elsewhere = directory / "elsewhere.lic"
    elsewhere.write_bytes(license_for(good.sealed, device.vendor, DeviceKey.generate()))
    refused: dict[str, tuple[ModelSource, type[FlexServeError]]] = {
        "no model file": (ModelSource("m", directory / "absent.flex", good.licence), NotFound),
        "no licence file": (ModelSource("m", good.sealed, directory / "absent.lic"), NotFound),
        "model is junk": (ModelSource("m", junk, good.licence), SealedMalformed),
        "licence is junk": (ModelSource("m", good.sealed, junk), LicenceMalformed),
        "unknown vendor": (foreign, VendorNotTrusted),
        "other device": (ModelSource("m", good.sealed, elsewhere), LicenceWrongDevice),
        "other model": (ModelSource("m", good.sealed, other.licence), LicenceWrongModel),
    }
    with linux_world(device) as world:
        yield Subject(world, good, refused, lambda: kill(world))


SUBJECTS: dict[str, Callable[[Path], AbstractContextManager[Subject]]] = {
    "fake": fake_subject,
    "linux": linux_subject,
}
