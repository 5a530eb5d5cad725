from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexserve.errors import ModelMalformed, NotFound
from flexserve.sealed.ggml_types import TENSOR_TYPES
from flexserve.sealed.gguf import StringArray, ValueType, check_model, describe, parse_header, read_header

from .gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    File,
    Key,
    Weight,
    nbytes,
    strings,
    tiny_model,
)

_INTEGERS = {
    U8: (0, 8),
    I8: (1, 8),
    U16: (0, 16),
    I16: (1, 16),
    U32: (0, 32),
    I32: (1, 32),
    U64: (0, 64),
    I64: (1, 64),
}


def _integers(kind: int) -> st.SearchStrategy[int]:
    signed, bits = _INTEGERS[kind]
    return st.integers(-(1 << bits - 1), (1 << bits - 1) - 1) if signed else st.integers(0, (1 << bits) - 1)


_names = st.text("abcXYZ019_.", min_size=1, max_size=10)


@st.composite
def _keys(draw: st.DrawFn) -> Key:
    name = "k." + draw(_names)
    kind = draw(st.sampled_from([*_INTEGERS, F32, F64, BOOL, STRING]))
    if kind in _INTEGERS:
        values: st.SearchStrategy[Any] = _integers(kind)
    elif kind == F32:
        values = st.floats(width=32, allow_nan=False)
    elif kind == F64:
        values = st.floats(allow_nan=False)
    elif kind == BOOL:
        values = st.sampled_from((0, 1))
    else:
        values = st.text("ab \n\0é€🙂", max_size=8)
    if draw(st.booleans()):
        return Key(name, ARRAY, draw(st.lists(values, max_size=5)), kind)
    return Key(name, kind, draw(values))


@st.composite
def _weights(draw: st.DrawFn) -> Weight:
    kind = TENSOR_TYPES[draw(st.sampled_from(sorted(TENSOR_TYPES)))]
    row = kind.block * draw(st.integers(1, 3))
    rest = draw(st.lists(st.integers(1, 4), max_size=3))
    return Weight("t." + draw(_names), (row, *rest), kind.id)


@given(
    st.lists(_keys(), max_size=5, unique_by=lambda k: k.name),
    st.lists(_weights(), max_size=4, unique_by=lambda w: w.name),
    st.sampled_from((8, 32, 256)),
)
def test_what_is_written_is_what_is_read(keys: list[Key], weights: list[Weight], alignment: int) -> None:
    file = File((*keys, Key("general.alignment", U32, alignment)), tuple(weights), alignment=alignment)
    data = file.to_bytes()
    header = parse_header(data, len(data))
    assert header.alignment == alignment
    assert header.data_offset == len(file.header()) + -len(file.header()) % alignment
    assert list(header.metadata) == [k.name for k in file.keys]
    for key in keys:
        assert isinstance(key.name, str)
        value = header.metadata[key.name]
        if isinstance(value, np.ndarray | StringArray):
            assert list(value) == list(key.value)
            assert header.types[key.name] == (ValueType.ARRAY, key.element)
        else:
            assert value == key.value
            assert header.types[key.name] == (ValueType(key.type), None)
    assert [(t.name, t.shape, t.type, t.nbytes) for t in header.tensors] == [
        (w.name, w.shape, w.type, nbytes(w)) for w in weights
    ]
    assert all(t.row_bytes * t.rows == t.nbytes for t in header.tensors)


def test_the_header_may_come_alone_but_not_shortened() -> None:
    file = tiny_model()
    data = file.to_bytes()
    header = parse_header(data, len(data))
    assert parse_header(data[: header.data_offset], len(data)).tensors == header.tensors
    with pytest.raises(ModelMalformed, match="ends inside"):
        parse_header(data[: header.data_offset - 1], len(data))


def test_reading_a_path_and_a_descriptor_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    data = tiny_model().to_bytes()
    path.write_bytes(data)
    raw, header = read_header(path)
    assert raw == data[: header.data_offset]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.lseek(descriptor, 5, os.SEEK_SET)
        assert read_header(descriptor)[0] == raw
    finally:
        os.close(descriptor)


def test_a_header_longer_than_the_first_read_is_read_on(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    file = File((strings("t", ["x" * 1000] * 6000),), (Weight("w", (32,)),))
    path.write_bytes(file.to_bytes())
    raw, header = read_header(path)
    assert len(raw) == header.data_offset > 6_000_000


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"m\.gguf"):
        read_header(tmp_path / "m.gguf")


def test_a_vocabulary_of_151936_tokens_takes_less_than_300_ms() -> None:
    tokens = [f"token{i}" for i in range(151936)]
    data = File((strings("t", tokens), strings("m", tokens))).to_bytes()
    times = []
    for _ in range(3):
        start = time.process_time()
        header = parse_header(data, len(data))
        times.append(time.process_time() - start)
    array = header.metadata["t"]
    assert isinstance(array, StringArray)
    assert (len(array), array[151935], array[1:3]) == (151936, "token151935", ["token1", "token2"])
    assert min(times) < 0.3


def test_a_token_that_is_no_utf8_is_kept_as_bytes() -> None:
    data = File((strings("t", [b"\xff", "é"]),)).to_bytes()
    array = parse_header(data, len(data)).metadata["t"]
    assert isinstance(array, StringArray)
    assert [array.raw(0), array[0], array[1]] == [b"\xff", "�", "é"]


@pytest.mark.parametrize("end", [0, 31])
def test_the_file_may_end_with_the_last_tensor_or_its_padding(end: int) -> None:
    file = File((), (Weight("w", (1,)),), data=bytes(4 + (28 if end else 0)))
    data = file.to_bytes()
    assert parse_header(data, len(data)).tensors[0].nbytes == 4


def test_a_file_without_tensors_needs_no_padding_but_is_no_model() -> None:
    data = File((Key("general.architecture", STRING, "llama"),)).header()
    header = parse_header(data, len(data))
    assert (header.data_offset, header.tensors) == (len(data), ())
    with pytest.raises(ModelMalformed):
        check_model(header)


def test_describe_says_what_the_file_says() -> None:
    data = tiny_model("qwen3", layers=2).with_key("general.file_type", U32, 0).to_bytes()
    header = parse_header(data, len(data))
    check_model(header)
    said = describe(header)
    assert (said.architecture, said.quantization, said.layers, said.context_tokens) == (
        "qwen3",
        "F32",
        2,
        512,
    )
    assert said.has_chat_template
    assert said.parameters * 4 == said.weight_bytes


def test_a_file_type_that_no_tensor_bears_out_is_not_believed() -> None:
    data = tiny_model().with_key("general.file_type", U32, 15).to_bytes()
    assert describe(parse_header(data, len(data))).quantization == "F32"


def test_the_type_table_is_the_gguf_packages() -> None:
    from gguf import GGML_QUANT_SIZES

    theirs = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    for number, kind in TENSOR_TYPES.items():
        if number != 42:  # Q2_0 is newer than the package
            assert theirs[number] == (kind.block, kind.block_bytes), kind.name


def test_the_fixed_fields_are_where_the_format_puts_them() -> None:
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(8)
    assert parse_header(data, len(data)).data_offset == 32
