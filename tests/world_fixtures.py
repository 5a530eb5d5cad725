"""Linux worlds for tests: files on disk as a device has them, and a world that uses them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flexserve.bench.shapes import ModelShape
from flexserve.framework.settings import Settings
from flexserve.sealed.keyfile import write_key
from flexserve.sealed.keys import DeviceKey, VendorKey
from flexserve.sealed.seal import seal
from flexserve.worlds.base import ModelSource
from flexserve.worlds.linux import LinuxWorld

from .sealed_fixtures import Kit, license_for, make_kit

DEMO = Path(__file__).parent.parent / "models" / "demo-assistant.gguf"


# A model of four megabytes has something to give, and can be streamed through less than it has.
SMALL_LIMITS = Settings(
    budget_bytes=1 << 30,
    cap_bytes=2 << 30,
    floor_bytes=2 << 20,
    stream_window_bytes=512 << 10,
    stream_behind_bytes=128 << 10,
)


@dataclass(frozen=True)
class Device:
    """A directory with a device's key, a trusted vendor's key and models sealed by that vendor."""

    directory: Path
    vendor: VendorKey
    key: DeviceKey

    @property
    def key_path(self) -> Path:
        return self.directory / "device.key"

    @property
    def vendor_path(self) -> Path:
        return self.directory / "vendor.pub"

    def add(self, name: str, gguf: Path, **options: Any) -> ModelSource:
        """Seal and license a model for this device."""
        flex, licence = self.directory / f"{name}.flex", self.directory / f"{name}.lic"
        seal(gguf, flex, self.vendor, **options)
        licence.write_bytes(license_for(flex, self.vendor, self.key))
        return ModelSource(name, flex, licence)

    def add_kit(self, name: str, shape: ModelShape) -> tuple[ModelSource, Kit]:
        """Random weights in a shape, sealed for this device; the kit has the plain GGUF."""
        kit = make_kit(self.directory / name, shape)
        return self.add(name, kit.gguf), kit


def make_device(directory: Path) -> Device:
    directory.mkdir(parents=True, exist_ok=True)
    device = Device(directory, VendorKey.generate(), DeviceKey.generate())
    write_key(device.key_path, device.key)
    device.vendor_path.write_bytes(device.vendor.public.pem)
    return device


@contextmanager
def linux_world(device: Device, **options: Any) -> Iterator[LinuxWorld]:
    """A started linux world on this device, with a state directory of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(device.directory / "state"))
        world = LinuxWorld(
            str(device.key_path),
            vendor_pub=device.vendor_path,
            **{"threads": 1, "settings": SMALL_LIMITS, **options},
        )
        world.start()
        try:
            yield world
        finally:
            world.close()


def kill(world: LinuxWorld) -> None:
    """End the secure process as the kernel's out-of-memory killer would."""
    assert world.pid is not None
    os.kill(world.pid, 9)
