"""A model with a LoRA adapter in the linux world: the way from two sealed files and two licences to an answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest

from flexserve.core import Budget, Finished, Request, Sampling
from flexserve.engine import llama
from flexserve.errors import (
    FlexServeError,
    LicenceWrongDevice,
    LicenceWrongModel,
    ModelUnsupported,
    NotFound,
    SegmentNotAuthentic,
    Usage,
    VendorNotTrusted,
)
from flexserve.sealed.keys import DeviceKey, VendorKey
from flexserve.sealed.seal import seal
from flexserve.worlds.base import AdapterSource, ModelSource
from flexserve.worlds.linux import LinuxWorld
from flexserve.worlds.linux.channel import AdapterUse
from flexserve.worlds.linux.storage import Storage

from ..adapters import write_adapter
from ..engine.secure_models import Plain
from ..sealed_fixtures import TINY, license_for
from ..world_fixtures import Device, kill, linux_world

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
TOKENS = 16


@dataclass(frozen=True)
class Files:
    """A model and an adapter for it, sealed for a device, and as they were."""

    model: ModelSource
    gguf: Path
    adapter_gguf: Path
    adapter: AdapterSource

    @property
    def together(self) -> ModelSource:
        return replace(self.model, adapter=self.adapter)


@pytest.fixture(scope="module")
def files(device: Device) -> Files:
    model, kit = device.add_kit("m", TINY)
    gguf = write_adapter(device.directory / "a.gguf", kit.gguf)
    sealed = device.add("a", gguf)
    return Files(model, kit.gguf, gguf, AdapterSource(sealed.sealed, sealed.licence))


@pytest.fixture(scope="module")
def world(device: Device) -> Iterator[LinuxWorld]:
    with linux_world(device) as started:
        yield started


def answer(world: LinuxWorld) -> tuple[int, ...]:
    request = Request(
        id="r",
        model="m",
        token_ids=PROMPT,
        max_tokens=TOKENS,
        ignore_eos=True,
        sampling=Sampling(temperature=0),
    )
    *_, last = world.generate(request)
    assert isinstance(last, Finished)
    return last.token_ids


def plain_answer(files: Files, scale: float | None) -> tuple[int, ...]:
    llama.start()
    other = Plain(files.gguf)
    try:
        if scale is not None:
            other.use_adapter(files.adapter_gguf, scale)
        return tuple(other.greedy(PROMPT, TOKENS).tokens)
    finally:
        other.close()


def test_it_answers_as_plain_llama_cpp_does_with_the_same_adapter(world: LinuxWorld, files: Files) -> None:
    world.register(files.model)
    without = answer(world)
    info = world.register(files.together)
    assert info.adapter == "random-adapter"
    assert world.status().models[0].info.adapter == "random-adapter"
    with_it = answer(world)
    half = replace(files.adapter, scale=0.5)
    world.register(replace(files.model, adapter=half))
    assert (without, with_it, answer(world)) == (
        plain_answer(files, None),
        plain_answer(files, 1.0),
        plain_answer(files, 0.5),
    )
    assert without != with_it


def wait_for_held(world: LinuxWorld, nbytes: int) -> Budget:
    """A model that was replaced is closed behind its successor's answer."""
    deadline = time.monotonic() + 60
    while (budget := world.budget()).held_bytes != nbytes:
        assert time.monotonic() < deadline, budget
        time.sleep(0.01)
    return budget


def test_the_adapter_counts_in_the_budget_and_no_recall_takes_it(world: LinuxWorld, files: Files) -> None:
    world.register(files.together)
    answer(world)
    adapter_bytes = files.adapter_gguf.stat().st_size
    shown = world.status().models[0].adapter_bytes
    assert adapter_bytes / 2 < shown < 2 * adapter_bytes + 4096
    world.budget(floor_bytes=0)
    try:
        world.recall(1 << 40).wait(60)
        left = wait_for_held(world, shown)
        assert left.soft_bytes == shown
        world.register(files.model)  # without it
        wait_for_held(world, 0)
    finally:
        world.budget(soft_bytes=1 << 30, floor_bytes=1 << 20)


def test_a_secure_world_that_was_killed_comes_back_with_the_adapter(world: LinuxWorld, files: Files) -> None:
    world.register(files.together)
    before = answer(world)
    kill(world)
    for _ in range(2):  # the first may still meet the dead one
        try:
            after = answer(world)
        except FlexServeError:
            continue
    assert after == before


Breaks = Callable[[Files, Device, Path], AdapterSource]


def another_vendors(files: Files, device: Device, directory: Path) -> AdapterSource:
    vendor, flex, licence = VendorKey.generate(), directory / "b.flex", directory / "b.lic"
    seal(files.adapter_gguf, flex, vendor)
    licence.write_bytes(license_for(flex, vendor, device.key))
    return AdapterSource(flex, licence)


def another_devices(files: Files, device: Device, directory: Path) -> AdapterSource:
    licence = directory / "b.lic"
    licence.write_bytes(license_for(files.adapter.sealed, device.vendor, DeviceKey.generate()))
    return replace(files.adapter, licence=licence)


def damaged(files: Files, device: Device, directory: Path) -> AdapterSource:
    flex = directory / "b.flex"
    data = bytearray(files.adapter.sealed.read_bytes())
    data[-1000] ^= 1
    flex.write_bytes(data)
    return replace(files.adapter, sealed=flex)


REFUSED: dict[str, tuple[Breaks, type[FlexServeError]]] = {
    "another vendor's": (another_vendors, VendorNotTrusted),
    "for another device": (another_devices, LicenceWrongDevice),
    "with the model's licence": (
        lambda files, _device, _directory: replace(files.adapter, licence=files.model.licence),
        LicenceWrongModel,
    ),
    "damaged": (damaged, SegmentNotAuthentic),
    "a model": (
        lambda files, _device, _directory: AdapterSource(files.model.sealed, files.model.licence),
        ModelUnsupported,
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_adapter_that_may_not_be_used_is_refused_and_said_to_be_the_adapter(
    world: LinuxWorld, files: Files, device: Device, tmp_path: Path, what: str
) -> None:
    make, kind = REFUSED[what]
    world.register(files.model)
    before = answer(world)
    with pytest.raises(kind, match="the adapter: "):
        world.register(replace(files.model, adapter=make(files, device, tmp_path)))
    assert answer(world) == before, "what was registered stays"


def test_an_adapter_by_itself_is_no_model(world: LinuxWorld, files: Files) -> None:
    with pytest.raises(ModelUnsupported, match="only whole models can be served") as caught:
        world.register(ModelSource("a", files.adapter.sealed, files.adapter.licence))
    assert "--adapter" in caught.value.hint


def test_a_missing_adapter_is_said_before_anything_is_sent(world: LinuxWorld, files: Files) -> None:
    with pytest.raises(NotFound, match=r"none\.flex"):
        world.register(replace(files.model, adapter=replace(files.adapter, sealed=Path("none.flex"))))


def test_a_gateway_that_was_root_keeps_the_adapter_open(files: Files, tmp_path: Path) -> None:
    flex, licence = tmp_path / "a.flex", tmp_path / "a.lic"
    flex.write_bytes(files.adapter.sealed.read_bytes())
    licence.write_bytes(files.adapter.licence.read_bytes())
    source = replace(files.model, adapter=AdapterSource(flex, licence, 2.0))
    storage, opened = Storage(), list[int]()
    storage.keep(source)
    flex.unlink()
    licence.unlink()
    use = storage.open_adapter(source.adapter, opened)
    storage.close()
    assert use == AdapterUse(files.adapter.licence.read_bytes(), 2.0)
    (fd,) = opened
    assert os.pread(fd, 8, 0) == b"FLEXSEAL"
    os.close(fd)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1001.0])
def test_a_scale_is_a_number_on_both_sides_of_the_channel(files: Files, scale: float) -> None:
    with pytest.raises(Usage, match="an adapter's scale"):
        replace(files.adapter, scale=scale)
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode([b"", scale]), type=AdapterUse)
