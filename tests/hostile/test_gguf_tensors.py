"""Attack: tensors whose shapes overflow, whose bytes overlap or lie outside the file."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexserve.errors import ModelMalformed
from flexserve.sealed.ggml_types import TENSOR_TYPES
from flexserve.sealed.gguf import parse_header

from ..sealed.gguf_bytes import File, Weight, tiny_model


def _refused(file: File, match: str, file_bytes: int | None = None) -> None:
    data = file.to_bytes()
    with pytest.raises(ModelMalformed, match=match):
        parse_header(data, len(data) if file_bytes is None else file_bytes)


def _tensor(*shape: int, kind: int = 0) -> File:
    return File((), (Weight("w", shape, kind, nbytes=64),))


@pytest.mark.parametrize("shape", [(0,), (4, 0), (4, 4, 0, 4)])
def test_empty_dimensions(shape: tuple[int, ...]) -> None:
    _refused(_tensor(*shape), "tensor 'w' has an empty dimension")


@pytest.mark.parametrize(
    "shape",
    [
        (1 << 63, 1),
        ((1 << 64) - 1,),
        (1 << 32, 1 << 32),
        (1 << 16, 1 << 16, 1 << 16, 1 << 16),
        ((1 << 62) + 1, 4),
        ((1 << 63) + 8, 2),
    ],
)
def test_products_that_overflow(shape: tuple[int, ...]) -> None:
    _refused(_tensor(*shape), "tensor 'w' would take")


def test_a_size_that_fits_64_bits_but_no_file() -> None:
    _refused(_tensor(1 << 20, 1 << 10), "tensor 'w' ends at byte")


@pytest.mark.parametrize("dimensions", [0, 5, 6])
def test_the_number_of_dimensions(dimensions: int) -> None:
    _refused(_tensor(*[1] * dimensions), f"tensor 'w' has {dimensions} dimensions")


@pytest.mark.parametrize("kind", [4, 5, 9, 15, 31, 33, 36, 38, 43, 255, (1 << 32) - 1])
def test_types_that_do_not_exist_or_are_no_weights(kind: int) -> None:
    _refused(_tensor(256, kind=kind), f"type {kind}, which is no type of a weight")


@pytest.mark.parametrize("kind", [k for k in TENSOR_TYPES.values() if k.block > 1], ids=lambda k: k.name)
def test_rows_that_are_no_whole_blocks(kind: object) -> None:
    assert hasattr(kind, "id")
    assert hasattr(kind, "block")
    _refused(_tensor(kind.block + kind.block // 2, kind=kind.id), "needs a multiple")


@given(st.integers(0, 3), st.one_of(st.integers(0, 4096), st.integers(0, (1 << 64) - 1)))
def test_tensors_lie_back_to_back_or_nowhere(which: int, offset: int) -> None:
    weights = [Weight(f"w{i}", (8, i + 1)) for i in range(4)]
    right = [0, 32, 96, 192][which]
    weights[which] = replace(weights[which], offset=offset)
    data = File((), tuple(weights)).to_bytes()
    if offset == right:
        assert parse_header(data, len(data)).tensors[which].offset == right
    else:
        with pytest.raises(ModelMalformed, match=f"tensor 'w{which}' begins at byte {offset}"):
            parse_header(data, len(data))


def test_a_file_cut_anywhere_is_refused() -> None:
    data = tiny_model().to_bytes()
    header = parse_header(data, len(data)).data_offset
    for size in [*range(0, header, 97), header - 1, header, header + 1, len(data) - 40, len(data) - 33]:
        with pytest.raises(ModelMalformed):
            parse_header(data[:size], size)


def test_bytes_after_the_last_tensor_are_refused() -> None:
    data = tiny_model().to_bytes()
    for extra in (1, 31, 32, 4096):
        with pytest.raises(ModelMalformed, match="follow the last tensor"):
            parse_header(data + bytes(extra), len(data) + extra)


def test_a_file_of_impossible_size_is_refused() -> None:
    _refused(tiny_model(), "at most", 1 << 50)
