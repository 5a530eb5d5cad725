"""Attack: a header that claims more than it has, to make its reader loop, allocate or read outside."""

from __future__ import annotations

import struct
import time
import tracemalloc
from dataclasses import replace

import pytest

from flexserve.errors import ModelMalformed
from flexserve.sealed.gguf import MAX_HEADER_BYTES, parse_header

from ..sealed.gguf_bytes import ARRAY, I32, STRING, U8, U32, File, Key, Weight, strings, tiny_model

HUGE = (1 << 31, 1 << 32, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def _refused(data: bytes, match: str) -> None:
    start = time.process_time()
    with pytest.raises(ModelMalformed, match=match):
        parse_header(data, len(data))
    assert time.process_time() - start < 1


def test_the_49_bytes_that_hang_the_gguf_package() -> None:
    """One key, an array of 2^60 numbers, and no number: gguf 0.19 walks all of them."""
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    data += struct.pack("<IIQ", ARRAY, U8, 1 << 60)
    assert len(data) == 49
    _refused(data, "ends inside the value of key 'a'")


@pytest.mark.parametrize("count", HUGE)
def test_huge_counts_cost_nothing(count: int) -> None:
    model = tiny_model()
    _refused(replace(model, key_count=count).to_bytes(), "metadata keys, at most")
    _refused(replace(model, weight_count=count).to_bytes(), "tensors, at most")


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize("element", [U8, I32, STRING])
def test_huge_arrays_cost_nothing(count: int, element: int) -> None:
    file = File((Key("k", ARRAY, [], element, count=count),), data=bytes(4096))
    _refused(file.to_bytes(), "key 'k'")


@pytest.mark.parametrize("length", HUGE)
def test_huge_lengths_of_names_and_values_are_refused(length: int) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    _refused(head + struct.pack("<Q", length) + bytes(64), "the name of key 0 is")
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<I", STRING)
    _refused(head + key + struct.pack("<Q", length) + bytes(64), "the value of key 'k' is")
    tensor = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", length)
    _refused(tensor + bytes(64), "the name of tensor 0 is")


@pytest.mark.parametrize("length", HUGE)
def test_a_string_in_an_array_cannot_reach_outside(length: int) -> None:
    array = struct.pack("<IIQ", ARRAY, STRING, 3) + struct.pack("<Q", 1) + b"a" + struct.pack("<Q", length)
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + array + bytes(64)
    _refused(data, "key 'k'")


def test_too_many_strings_in_several_arrays_are_refused_early() -> None:
    empty = b"".join([struct.pack("<Q", 0)]) * (1 << 19)
    keys = b"".join(
        struct.pack("<Q", 1) + name + struct.pack("<IIQ", ARRAY, STRING, 1 << 19) + empty
        for name in (b"a", b"b", b"c")
    )
    _refused(b"GGUF" + struct.pack("<IQQ", 3, 0, 3) + keys, "more than 1048576 strings")


def test_a_header_of_more_than_64_mib_is_refused_unread() -> None:
    data = File((Key("k", ARRAY, [], U8, count=MAX_HEADER_BYTES),)).header() + bytes(MAX_HEADER_BYTES)
    _refused(data, "ends inside")


def test_memory_stays_near_the_size_of_the_header() -> None:
    data = File((strings("t", ["x"] * 100_000),)).to_bytes()
    tracemalloc.start()
    try:
        parse_header(data, len(data))
        assert tracemalloc.get_traced_memory()[1] < 3 * len(data)
    finally:
        tracemalloc.stop()


def test_names_at_the_limit_pass_and_beyond_do_not() -> None:
    for size, ok in ((63, True), (64, False)):
        data = File((), (Weight("w" * size, (1,)),)).to_bytes()
        if ok:
            assert parse_header(data, len(data)).tensors
        else:
            _refused(data, "64 bytes long")
    _refused(File((Key("k" * 257, U32, 1),)).to_bytes(), "257 bytes long")


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "\x1b[2J", b"\xff\xfe"])
def test_names_that_could_harm_a_log_are_refused(name: str | bytes) -> None:
    _refused(File((Key(name, U32, 1),)).to_bytes(), "the name of key 0")
    _refused(File((), (Weight(name, (1,)),)).to_bytes(), "the name of tensor 0")


def test_what_occurs_twice_is_refused() -> None:
    _refused(File((Key("k", U32, 1), Key("k", U8, 1))).to_bytes(), "key 'k' occurs twice")
    _refused(File((), (Weight("w", (1,)), Weight("w", (2,)))).to_bytes(), "tensor 'w' occurs twice")


def test_arrays_of_arrays_are_refused() -> None:
    file = File((Key("k", ARRAY, [b""] * 0, ARRAY, count=1),), data=bytes(64))
    _refused(file.to_bytes(), "array of arrays")


@pytest.mark.parametrize("kind", [13, 14, 255, 1 << 31])
def test_unknown_value_types_are_refused(kind: int) -> None:
    _refused(File((Key("k", kind, b"\0" * 8),)).to_bytes(), "unknown value type")


def test_a_bool_is_0_or_1() -> None:
    _refused(File((Key("k", 7, 2),)).to_bytes(), "neither 0 nor 1")


def test_text_that_is_no_utf8_is_refused() -> None:
    _refused(File((Key("k", STRING, b"\xff"),)).to_bytes(), "the value of key 'k' is not UTF-8")


@pytest.mark.parametrize("version", [0, 1, 4, 3 << 24])
def test_other_versions_and_byte_orders_are_refused(version: int) -> None:
    _refused(replace(tiny_model(), version=version).to_bytes(), "only versions 2 and 3")


def test_other_files_are_refused() -> None:
    _refused(replace(tiny_model(), magic=b"GGML").to_bytes(), "not a GGUF file")
    _refused(b"", "ends inside its first fields")
    _refused(b"GGUF", "ends inside its first fields")


@pytest.mark.parametrize("value", [0, 1, 7, 24, 1 << 17, (1 << 32) - 1])
def test_impossible_alignments_are_refused(value: int) -> None:
    _refused(File((Key("general.alignment", U32, value),)).to_bytes(), "a power of two from 8")


def test_an_alignment_of_another_type_is_refused() -> None:
    _refused(File((Key("general.alignment", I32, 32),)).to_bytes(), "must be a uint32")
