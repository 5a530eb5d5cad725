"""The bench directory: what is made, what is used again, and what it takes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from flexserve.bench.files import prepare_model
from flexserve.errors import StorageFailure, Usage


def test_a_model_is_made_once_and_its_size_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    seen: list[tuple[int, int]] = []
    first = prepare_model(tmp_path, "tiny-qwen3", "Q8_0", said.append, lambda d, t: seen.append((d, t)))
    assert any("generating" in line for line in said)
    assert any("takes" in line and str(tmp_path) in line for line in said)
    assert seen
    made = [path.stat().st_mtime_ns for path in (first.gguf, first.source.sealed)]
    said.clear()
    again = prepare_model(tmp_path, "tiny-qwen3", "Q8_0", said.append)
    assert again == first
    assert [path.stat().st_mtime_ns for path in (again.gguf, again.source.sealed)] == made
    assert not any("generating" in line or "sealing" in line for line in said)
    assert again.disk_bytes == again.gguf.stat().st_size + again.source.sealed.stat().st_size


def test_a_model_sealed_with_keys_that_are_gone_is_sealed_again(tmp_path: Path) -> None:
    first = prepare_model(tmp_path, "tiny-qwen3", "Q8_0", lambda _text: None)
    before = first.source.sealed.read_bytes()
    for key in tmp_path.glob("vendor.*"):
        key.unlink()
    again = prepare_model(tmp_path, "tiny-qwen3", "Q8_0", lambda _text: None)
    assert again.source.sealed.read_bytes() != before


def test_a_sealed_model_that_is_damaged_or_without_its_licence_is_sealed_again(tmp_path: Path) -> None:
    model = prepare_model(tmp_path, "tiny-qwen3", "Q8_0", lambda _text: None)
    model.source.licence.unlink()
    said: list[str] = []
    prepare_model(tmp_path, "tiny-qwen3", "Q8_0", said.append)
    assert any("sealing" in line for line in said)
    model.source.sealed.write_bytes(model.source.sealed.read_bytes()[:-4096])
    said.clear()
    prepare_model(tmp_path, "tiny-qwen3", "Q8_0", said.append)
    assert any("sealing" in line for line in said)


def test_a_disk_that_is_too_small_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage3(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage3(10, 10, 0))
    with pytest.raises(StorageFailure, match=r"takes 2\.6. GB .* 0\.00 GB are free") as caught:
        prepare_model(tmp_path, "llama-3.2-1b", "Q8_0", lambda _text: None)
    assert "--directory" in caught.value.hint
    assert not list(tmp_path.glob("*.gguf"))


def test_a_directory_that_cannot_be_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailure, match="file"):
        prepare_model(tmp_path / "file", "tiny-qwen3", "Q8_0", lambda _text: None)


def test_unknown_shapes_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(Usage, match="no model shape"):
        prepare_model(tmp_path, "llama-9", "Q8_0", lambda _text: None)
