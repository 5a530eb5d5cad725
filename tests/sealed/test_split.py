"""A split model is sealed as the one model it is; a part that is missing or wrong is named."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from flexserve.errors import FlexServeError, ModelMalformed, NotFound, Usage
from flexserve.sealed.format import RegionKind
from flexserve.sealed.keys import VendorKey
from flexserve.sealed.reader import SealedModel
from flexserve.sealed.seal import seal

from ..architectures import CASES, NARROW, with_weights
from ..sealed_fixtures import model_key
from .gguf_bytes import I32, STRING, U16, File, Key, nbytes

VENDOR = VendorKey.generate()


def split(file: File, sizes: Sequence[int]) -> list[File]:
    """The parts as llama-gguf-split writes them, of that many tensors each."""
    assert sum(sizes) == len(file.weights)
    assert file.data is not None
    parts: list[File] = []
    first, at = 0, 0
    for number, size in enumerate(sizes):
        weights = file.weights[first : first + size]
        length = sum(nbytes(w) + -nbytes(w) % file.alignment for w in weights)
        keys = (
            *(file.keys if number == 0 else ()),
            Key("split.no", U16, number),
            Key("split.count", U16, len(sizes)),
            Key("split.tensors.count", I32, len(file.weights)),
        )
        parts.append(File(keys, weights, data=file.data[at : at + length]))
        first, at = first + size, at + length
    return parts


def write_parts(parts: Sequence[File], directory: Path, name: str = "model") -> list[Path]:
    paths = [directory / f"{name}-{i + 1:05}-of-{len(parts):05}.gguf" for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(part.to_bytes())
    return paths


@pytest.fixture(scope="module")
def whole() -> File:
    return with_weights(CASES["Qwen3"].make(NARROW), "Q8_0", 5)


@pytest.fixture
def parts(whole: File, tmp_path: Path) -> list[Path]:
    count = len(whole.weights)
    return write_parts(split(whole, [3, 1, count - 4]), tmp_path)


def opened(flex: Path) -> list[bytes]:
    """META and the image."""
    with flex.open("rb") as file:
        model = SealedModel.open(file.fileno(), [VENDOR.public]).unlock(model_key(flex, VENDOR))
        return [model.read_region(kind) for kind in RegionKind]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_it_is_the_model_that_was_split(count: int, whole: File, tmp_path: Path, flex: Path) -> None:
    total = len(whole.weights)
    cuts = sorted(random.Random(count).sample(range(total), count - 1))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
    paths = write_parts(split(whole, sizes), tmp_path)
    seal(paths[0], flex, VENDOR)
    one = tmp_path / "one.gguf"
    one.write_bytes(whole.to_bytes())
    seal(one, other := tmp_path / "other.flex", VENDOR)
    # A single part keeps its key `split.count`; otherwise even the header is the same.
    assert opened(flex)[count == 1 :] == opened(other)[count == 1 :]


def refused(path: Path, flex: Path, error: type[FlexServeError], match: str) -> None:
    with pytest.raises(error, match=match):
        seal(path, flex, VENDOR)
    assert not flex.exists()


def test_a_missing_part_is_named(parts: list[Path], flex: Path) -> None:
    parts[1].unlink()
    refused(
        parts[0], flex, NotFound, r"part 2 of 3 is missing: there is no file .*model-00002-of-00003\.gguf"
    )


def test_another_part_than_the_first_is_not_the_model(parts: list[Path], flex: Path) -> None:
    with pytest.raises(Usage, match="is part 2 of 3") as caught:
        seal(parts[1], flex, VENDOR)
    assert str(parts[0]) in caught.value.hint


def test_a_part_under_another_name_cannot_lead_to_the_others(parts: list[Path], flex: Path) -> None:
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    refused(renamed, flex, Usage, "part 1 of 3, but its name does not end in -00001-of-00003.gguf")


def test_a_part_twice_is_a_wrong_part(parts: list[Path], flex: Path) -> None:
    parts[2].write_bytes(parts[1].read_bytes())
    refused(parts[0], flex, ModelMalformed, "should be part 3 of 3, and it is part 2 of 3")


def test_a_whole_model_in_a_parts_place_is_a_wrong_part(parts: list[Path], whole: File, flex: Path) -> None:
    parts[1].write_bytes(whole.to_bytes())
    refused(parts[0], flex, ModelMalformed, "should be part 2 of 3, and it is no part of a split model")


def test_a_tensor_in_two_parts_is_found(whole: File, tmp_path: Path, flex: Path) -> None:
    pieces = split(whole, [3, 1, len(whole.weights) - 4])
    pieces[1] = replace(pieces[1], weights=pieces[0].weights[:1], data=None)
    paths = write_parts(pieces, tmp_path)
    refused(paths[0], flex, ModelMalformed, "occurs twice")


def test_too_few_tensors_are_found(whole: File, tmp_path: Path, flex: Path) -> None:
    pieces = split(whole, [3, 1, len(whole.weights) - 4])
    pieces[1] = replace(pieces[1], weights=(), data=b"")
    paths = write_parts(pieces, tmp_path)
    total = len(whole.weights)
    refused(
        paths[0], flex, ModelMalformed, f"the 3 parts have {total - 1} tensors, and the first says {total}"
    )


def test_a_part_of_another_model_is_found(whole: File, tmp_path: Path, flex: Path) -> None:
    pieces = split(whole, [3, 1, len(whole.weights) - 4])
    pieces[1] = pieces[1].with_key("general.architecture", STRING, "llama")
    refused(write_parts(pieces, tmp_path)[0], flex, ModelMalformed, "of another model")


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("split.count", 60_000, ModelMalformed),
        ("split.no", 7, Usage),
        ("split.tensors.count", 1, ModelMalformed),
    ],
)
def test_impossible_numbers_are_refused(
    key: str, value: int, error: type[FlexServeError], whole: File, tmp_path: Path, flex: Path
) -> None:
    pieces = split(whole, [3, len(whole.weights) - 3])
    kind = next(k.type for k in pieces[0].keys if k.name == key)
    pieces[0] = pieces[0].with_key(key, kind, value)
    refused(write_parts(pieces, tmp_path)[0], flex, error, "split|part")


def test_it_is_not_sealed_over_one_of_its_parts(parts: list[Path]) -> None:
    before = parts[1].read_bytes()
    with pytest.raises(Usage, match="is the model itself"):
        seal(parts[0], parts[1], VENDOR)
    assert parts[1].read_bytes() == before
