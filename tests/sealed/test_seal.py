from __future__ import annotations

import errno
import os
import tracemalloc
from pathlib import Path

import pytest

from flexserve.errors import ModelMalformed, NotFound, SealedMalformed, StorageFailure, Usage
from flexserve.sealed.format import decode_prefix
from flexserve.sealed.gguf import GGUFHeader, check_model
from flexserve.sealed.seal import default_model_id, seal

from ..sealed_fixtures import Kit, full_check, license_for


def files(path: Path) -> set[str]:
    return {p.name for p in path.iterdir()}


def test_progress_ends_with_everything_done(small: Kit, flex: Path) -> None:
    seen: list[tuple[int, int]] = []
    manifest = seal(small.gguf, flex, small.vendor, progress=lambda *at: seen.append(at))
    total = manifest.plan.file_bytes - manifest.plan.data_offset
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_memory_does_not_grow_with_the_model(small: Kit, flex: Path, tmp_path: Path) -> None:
    from flexserve.bench.generate import write_model
    from flexserve.bench.shapes import ModelShape

    big = tmp_path / "big.gguf"
    write_model(ModelShape("big", "llama", 8, 512, 2048, 8, 4, 64, 512, 64, 1e4, 1e-5, False), "F16", big)
    assert big.stat().st_size > 48 << 20
    tracemalloc.start()
    seal(big, flex, small.vendor)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20  # besides two buffers of 1 MiB for each thread, which are not counted


def test_a_failed_write_leaves_no_file_and_the_old_one_as_it_was(
    kit: Kit, flex: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flex.write_bytes(b"the old file")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageFailure, match="No space left"):
        seal(kit.gguf, flex, kit.vendor)
    assert files(flex.parent) == {flex.name}
    assert flex.read_bytes() == b"the old file"


def test_file_systems_without_direct_writes_give_the_same_file(
    small: Kit, flex: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused when the file is opened, and refused in the middle: both are written through the page cache."""
    real_open, real_pwrite = os.open, os.pwrite
    direct: set[int] = set()
    refused: list[str] = []

    def no_open(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            refused.append("open")
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, mode)

    def watch_open(path: str, flags: int, mode: int = 0o777) -> int:
        fd = real_open(path, flags, mode)
        if flags & os.O_DIRECT:
            direct.add(fd)
        return fd

    def no_write(fd: int, data: memoryview, offset: int) -> int:
        if fd in direct and offset > small.manifest.plan.regions[2].file_offset:
            refused.append("write")
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_pwrite(fd, data, offset)

    for attribute, change in (("open", no_open), ("pwrite", no_write)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", watch_open)
            patch.setattr(os, attribute, change)
            seal(small.gguf, flex, small.vendor)
        licence = license_for(flex, small.vendor, small.device)
        assert full_check(flex, licence, small.device, [small.vendor.public])[0].authentic
    assert "open" in refused


def test_a_failed_read_of_the_model_is_not_blamed_on_the_output(
    kit: Kit, flex: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StorageFailure, match="cannot read the model file"):
        seal(kit.gguf, flex, kit.vendor)
    assert not files(flex.parent)


def test_an_interrupt_stops_the_threads_and_leaves_no_file(kit: Kit, flex: Path) -> None:
    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seal(kit.gguf, flex, kit.vendor, progress=interrupt)
    assert not files(flex.parent)


def test_nothing_has_the_final_name_before_it_is_synced(
    kit: Kit, flex: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    there: list[bool] = []

    def watch(fd: int) -> None:
        there.append(flex.exists())
        real(fd)

    monkeypatch.setattr(os, "fsync", watch)
    seal(kit.gguf, flex, kit.vendor)
    assert there == [False, True]  # the file before the rename, its directory after


def test_a_model_that_shrinks_while_it_is_sealed_is_refused(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(kit.gguf.read_bytes())

    def cut(header: GGUFHeader) -> None:
        check_model(header)
        os.truncate(gguf, gguf.stat().st_size - 5000)

    monkeypatch.setattr("flexserve.sealed.seal.check_model", cut)
    with pytest.raises(ModelMalformed, match="became shorter"):
        seal(gguf, tmp_path / "m.flex", kit.vendor)
    assert files(tmp_path) == {"m.gguf"}


def test_bad_calls_are_refused_before_anything_is_written(kit: Kit, flex: Path) -> None:
    with pytest.raises(Usage, match="cannot be a model id"):
        seal(kit.gguf, flex, kit.vendor, "no spaces")
    for version in (0, -1, 1 << 63):
        with pytest.raises(Usage, match="version"):
            seal(kit.gguf, flex, kit.vendor, "m", version)
    with pytest.raises(NotFound):
        seal(flex.with_name("none.gguf"), flex, kit.vendor)
    with pytest.raises(Usage, match="is the model itself"):
        seal(kit.gguf, kit.gguf, kit.vendor)
    with pytest.raises(StorageFailure, match="cannot create"):
        seal(kit.gguf, flex.parent / "none" / "m.flex", kit.vendor)
    assert not files(flex.parent)


def test_a_plain_and_a_sealed_file_that_are_mixed_up_are_told_apart(kit: Kit, flex: Path) -> None:
    with pytest.raises(ModelMalformed) as refused:
        seal(kit.flex, flex, kit.vendor)
    assert "sealed already" in refused.value.hint
    gguf = kit.gguf.read_bytes()
    with pytest.raises(SealedMalformed) as plain:
        decode_prefix(gguf[:136], len(gguf))
    assert "flexserve seal" in plain.value.hint


def test_id_and_version_can_be_chosen_and_have_defaults(kit: Kit, flex: Path) -> None:
    assert (kit.manifest.model_id, kit.manifest.model_version) == ("tiny-with-random-weights", 1)
    manifest = seal(kit.gguf, flex, kit.vendor, "Acme.7", 12)
    assert (manifest.model_id, manifest.model_version) == ("Acme.7", 12)
    full_check(flex, license_for(flex, kit.vendor, kit.device), kit.device, [kit.vendor.public])


@pytest.mark.parametrize(
    ("name", "stem", "model_id"),
    [
        ("Llama 3.2 1B", "x", "llama-3.2-1b"),
        ("", "My_Model-Q8", "my_model-q8"),
        ("模型", "--", "model"),
        ("a" * 100, "", "a" * 64),
    ],
)
def test_a_default_id_is_made_from_the_name_or_the_file(name: str, stem: str, model_id: str) -> None:
    assert default_model_id(name, stem) == model_id
