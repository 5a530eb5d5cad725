"""Reads the header of a GGUF file that may be hostile: metadata, tensor names, shapes, types and places.

Every count, length, offset and product is checked against a limit and against the bytes that are really
there before it is used, so that a header of n bytes costs O(n) time and memory whatever it claims. What
passes obeys the rules llama.cpp's own reader has, and some stricter ones; the numbers in it can be trusted
as numbers. Whether they make a model that llama.cpp can load is `check_model`'s question (model_rules.py).

Knows nothing of encryption or of where tensors go in memory (layout.py). Format: ggml's docs/gguf.md;
little-endian, versions 2 and 3, which are laid out the same.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelMalformed, NotFound, StorageFailure
from .ggml_types import FILE_TYPES, TENSOR_TYPES
from .model_rules import check_model
from .string_array import StringArray

__all__ = [
    "GGUFHeader",
    "ModelDescription",
    "StringArray",
    "TensorInfo",
    "ValueType",
    "check_model",
    "describe",
    "parse_header",
    "read_header",
]

MAX_HEADER_BYTES = 64 << 20  # the largest vocabularies in use need 20 MB
MAX_FILE_BYTES = 1 << 44
MAX_KEYS = 4096
MAX_TENSORS = 16384
MAX_KEY_BYTES = 256
MAX_NAME_BYTES = 63  # GGML_MAX_NAME is 64 with the final NUL
MAX_VALUE_BYTES = 32 << 20  # some files carry a whole tokenizer.json; chat templates have a smaller limit
MAX_STRING_BYTES = 1 << 20  # an element of an array
MAX_ARRAY_STRINGS = 1 << 20  # in all arrays of strings together
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16
DEFAULT_ALIGNMENT = 32

_MAGIC = b"GGUF"
_FIXED = struct.Struct("<4sIQQ")  # magic, version, tensors, keys
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class ValueType(IntEnum):
    """The type of a metadata value (`enum gguf_type`)."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_DTYPES: Mapping[ValueType, np.dtype[Any]] = {
    ValueType.UINT8: np.dtype("<u1"),
    ValueType.INT8: np.dtype("<i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("?"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}


NumberArray = npt.NDArray[Any]
Value = bool | int | float | str | StringArray | NumberArray


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` in ggml's order (row length first), `type` a `ggml_type` number, `offset` in bytes
    from the start of the data section, `nbytes` without padding."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int

    @property
    def type_name(self) -> str:
        return TENSOR_TYPES[self.type].name

    @property
    def elements(self) -> int:
        product = 1
        for n in self.shape:
            product *= n
        return product

    @property
    def row_bytes(self) -> int:
        kind = TENSOR_TYPES[self.type]
        return self.shape[0] // kind.block * kind.block_bytes

    @property
    def rows(self) -> int:
        return self.elements // self.shape[0]


@dataclass(frozen=True, eq=False)
class GGUFHeader:
    """Everything in a GGUF file but the weights. `data_offset` is the header's length with its padding;
    arrays of numbers are read-only numpy views, arrays of strings are decoded lazily."""

    version: int
    alignment: int
    metadata: Mapping[str, Value]
    types: Mapping[str, tuple[ValueType, ValueType | None]]  # of a value; the second: of an array's elements
    spans: Mapping[
        str, tuple[int, int]
    ]  # where a key with its value lies in the header: first byte, one behind the last
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    file_bytes: int

    @property
    def architecture(self) -> str:
        """`general.architecture`, or "" (which `check_model` refuses)."""
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else ""


class _HeaderContinues(ModelMalformed):
    """The header goes on after the bytes given."""


class _Reader:
    """A position in the header that never passes its end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.pos = 0

    def need(self, count: int, what: str) -> int:
        """Claim `count` bytes; returns where they start."""
        start = self.pos
        if count > len(self.data) - start:
            raise _HeaderContinues(f"the header ends inside {what}")
        self.pos = start + count
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.data, self.need(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.data, self.need(8, what))[0]
        return value

    def string(self, what: str, limit: int) -> str:
        length = self.u64(what)
        if length > limit:
            raise ModelMalformed(f"{what} is {length} bytes long, at most {limit} are allowed")
        start = self.need(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise ModelMalformed(f"{what} is not UTF-8") from None

    def name(self, what: str, limit: int) -> str:
        text = self.string(what, limit)
        if not text or not text.isprintable():
            raise ModelMalformed(f"{what} is {text!r}: it must be printable and not empty")
        return text

    def value_type(self, key: str) -> ValueType:
        number = self.u32(f"key {key!r}")
        if number > ValueType.FLOAT64:
            raise ModelMalformed(f"key {key!r} has unknown value type {number}")
        return ValueType(number)


def parse_header(data: bytes, file_bytes: int) -> GGUFHeader:
    """Read a header from `data`, which holds at least all of it, of a file of `file_bytes`.

    Raises `ModelMalformed` naming the key or tensor and the rule.
    """
    if file_bytes > MAX_FILE_BYTES:
        raise ModelMalformed(f"the file has {file_bytes} bytes, at most {MAX_FILE_BYTES} are allowed")
    reader = _Reader(bytes(data[: min(file_bytes, MAX_HEADER_BYTES)]))
    magic, version, tensor_count, key_count = _FIXED.unpack_from(
        reader.data, reader.need(_FIXED.size, "its first fields")
    )
    if magic != _MAGIC:
        raise ModelMalformed("not a GGUF file: it does not begin with 'GGUF'")
    if version not in (2, 3):
        big = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
        raise ModelMalformed(
            f"GGUF version {version}{big}: only versions 2 and 3, little-endian, can be read"
        )
    if key_count > MAX_KEYS:
        raise ModelMalformed(f"{key_count} metadata keys, at most {MAX_KEYS} are allowed")
    if tensor_count > MAX_TENSORS:
        raise ModelMalformed(f"{tensor_count} tensors, at most {MAX_TENSORS} are allowed")
    metadata, types, spans = _read_metadata(reader, key_count)
    alignment = _alignment(metadata, types)
    tensors = _read_tensors(reader, tensor_count, alignment)
    data_offset = reader.pos + -reader.pos % alignment
    end = 0
    if tensors:
        end = tensors[-1].offset + tensors[-1].nbytes
        if data_offset + end > file_bytes:
            raise ModelMalformed(
                f"tensor {tensors[-1].name!r} ends at byte {data_offset + end} of a file of {file_bytes}"
            )
    else:  # then there need be no padding either
        data_offset = min(data_offset, file_bytes)
    if file_bytes > data_offset + end + -end % alignment:
        raise ModelMalformed(
            f"{file_bytes - data_offset - end} bytes follow the last tensor: more than padding to {alignment}"
        )
    if data_offset > len(reader.data):
        raise _HeaderContinues("the header ends inside its padding")
    return GGUFHeader(
        version=version,
        alignment=alignment,
        metadata=MappingProxyType(metadata),
        types=MappingProxyType(types),
        spans=MappingProxyType(spans),
        tensors=tensors,
        data_offset=data_offset,
        file_bytes=file_bytes,
    )


def _read_metadata(
    reader: _Reader, count: int
) -> tuple[dict[str, Value], dict[str, tuple[ValueType, ValueType | None]], dict[str, tuple[int, int]]]:
    metadata: dict[str, Value] = {}
    types: dict[str, tuple[ValueType, ValueType | None]] = {}
    spans: dict[str, tuple[int, int]] = {}
    strings = 0
    for number in range(count):
        start = reader.pos
        key = reader.name(f"the name of key {number}", MAX_KEY_BYTES)
        if key in metadata:
            raise ModelMalformed(f"key {key!r} occurs twice")
        kind = reader.value_type(key)
        element: ValueType | None = None
        if kind is ValueType.ARRAY:
            element = reader.value_type(key)
            length = reader.u64(f"key {key!r}")
            if element is ValueType.ARRAY:
                raise ModelMalformed(f"key {key!r} is an array of arrays")
            if element is ValueType.STRING:
                strings += length
                if strings > MAX_ARRAY_STRINGS:
                    raise ModelMalformed(
                        f"key {key!r}: more than {MAX_ARRAY_STRINGS} strings in arrays altogether"
                    )
                metadata[key] = _string_array(reader, key, length)
            else:
                metadata[key] = _number_array(reader, key, element, length)
        elif kind is ValueType.STRING:
            metadata[key] = reader.string(f"the value of key {key!r}", MAX_VALUE_BYTES)
        else:
            metadata[key] = _number_array(reader, key, kind, 1)[0].item()
        types[key] = (kind, element)
        spans[key] = (start, reader.pos)
    return metadata, types, spans


def _number_array(reader: _Reader, key: str, kind: ValueType, length: int) -> NumberArray:
    dtype = _DTYPES[kind]
    start = reader.need(length * dtype.itemsize, f"the value of key {key!r}")
    if kind is ValueType.BOOL:
        octets = np.frombuffer(reader.data, np.uint8, length, start)
        if length and octets.max() > 1:
            raise ModelMalformed(f"key {key!r}: a bool is neither 0 nor 1")
    return np.frombuffer(reader.data, dtype, length, start)


def _string_array(reader: _Reader, key: str, count: int) -> StringArray:
    data, pos = reader.data, reader.pos
    end = len(data)
    if count > (end - pos) // 8:  # each string has at least its length: refuse before walking
        raise _HeaderContinues(f"the header ends inside the value of key {key!r}")
    starts = array("Q", bytes(8 * count))
    unpack = _U64.unpack_from
    longest = 0
    first = pos
    for i in range(count):
        starts[i] = pos
        if end - pos < 8:
            raise _HeaderContinues(f"the header ends inside the value of key {key!r}")
        (length,) = unpack(data, pos)
        if length > longest:
            longest = length
            if length > MAX_STRING_BYTES:
                raise ModelMalformed(f"key {key!r}: string {i} is longer than {MAX_STRING_BYTES} bytes")
        pos += 8 + length
    if pos > end:
        raise _HeaderContinues(f"the header ends inside the value of key {key!r}")
    reader.pos = pos
    return StringArray(data, starts, longest, pos - first - 8 * count)


def _alignment(metadata: Mapping[str, Value], types: Mapping[str, tuple[ValueType, ValueType | None]]) -> int:
    key = "general.alignment"
    if key not in metadata:
        return DEFAULT_ALIGNMENT
    value = metadata[key]
    if types[key][0] is not ValueType.UINT32 or not isinstance(value, int):
        raise ModelMalformed(f"key {key!r} must be a uint32")
    if value < 8 or value > MAX_ALIGNMENT or value & (value - 1):
        raise ModelMalformed(f"key {key!r} is {value}: it must be a power of two from 8 to {MAX_ALIGNMENT}")
    return value


def _read_tensors(reader: _Reader, count: int, alignment: int) -> tuple[TensorInfo, ...]:
    tensors: list[TensorInfo] = []
    names: set[str] = set()
    expected = 0  # llama.cpp wants the tensors back to back, in the order they are listed
    for number in range(count):
        name = reader.name(f"the name of tensor {number}", MAX_NAME_BYTES)
        what = f"tensor {name!r}"
        if name in names:
            raise ModelMalformed(f"{what} occurs twice")
        names.add(name)
        dimensions = reader.u32(what)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ModelMalformed(f"{what} has {dimensions} dimensions, 1 to {MAX_DIMENSIONS} are allowed")
        shape = tuple(reader.u64(what) for _ in range(dimensions))
        type_number = reader.u32(what)
        offset = reader.u64(what)
        kind = TENSOR_TYPES.get(type_number)
        if kind is None:
            raise ModelMalformed(f"{what} has type {type_number}, which is no type of a weight")
        if min(shape) < 1:
            raise ModelMalformed(f"{what} has an empty dimension: {shape}")
        if shape[0] % kind.block:
            raise ModelMalformed(
                f"{what} has rows of {shape[0]} elements: {kind.name} needs a multiple of {kind.block}"
            )
        nbytes = shape[0] // kind.block * kind.block_bytes
        for n in shape[1:]:
            nbytes *= n
        if nbytes > MAX_FILE_BYTES:
            raise ModelMalformed(f"{what} would take {nbytes} bytes")
        if offset != expected:
            raise ModelMalformed(f"{what} begins at byte {offset} of the data: it must begin at {expected}")
        expected = offset + nbytes + -nbytes % alignment
        tensors.append(TensorInfo(name, shape, type_number, offset, nbytes))
    return tuple(tensors)


def read_header(source: int | Path | str) -> tuple[bytes, GGUFHeader]:
    """Read and check the header of an open file (descriptor; its position is not used) or of a path.

    Returns the header's bytes, padding included, and what they say. Reads no more than it needs, in growing
    steps up to `MAX_HEADER_BYTES`. Raises `NotFound`, `StorageFailure`, `ModelMalformed`.
    """
    with ExitStack() as stack:
        try:
            if isinstance(source, int):
                descriptor = source
            else:
                descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, descriptor)
            file_bytes = os.fstat(descriptor).st_size
            limit = min(file_bytes, MAX_HEADER_BYTES)
            data = b""
            step = 1 << 20
            while True:
                data += _read_exactly(descriptor, min(step, limit) - len(data), len(data))
                try:
                    header = parse_header(data, file_bytes)
                except _HeaderContinues as error:
                    if len(data) < limit:
                        step *= 4
                        continue
                    if limit == file_bytes:
                        raise
                    raise ModelMalformed(f"{error.message}: longer than {MAX_HEADER_BYTES} bytes") from None
                return data[: header.data_offset], header
        except FileNotFoundError:
            raise NotFound(f"there is no model file {source}") from None
        except OSError as error:
            raise StorageFailure(f"cannot read the model file {source}: {error.strerror}") from error


def _read_exactly(descriptor: int, count: int, offset: int) -> bytes:
    pieces: list[bytes] = []
    while count > 0:
        piece = os.pread(descriptor, count, offset)
        if not piece:
            raise ModelMalformed("the file became shorter while it was read")
        pieces.append(piece)
        count -= len(piece)
        offset += len(piece)
    return b"".join(pieces)


@dataclass(frozen=True)
class ModelDescription:
    """What a header says about its model, for people and for `core.ModelInfo`."""

    architecture: str
    name: str
    quantization: str
    parameters: int
    layers: int
    context_tokens: int
    weight_bytes: int
    has_chat_template: bool


def describe(header: GGUFHeader) -> ModelDescription:
    """Summarise a header that passed `check_model`."""

    def number(key: str) -> int:
        value = header.metadata.get(key, 0)
        return value if isinstance(value, int) else 0

    arch = header.architecture
    name = header.metadata.get("general.name", "")
    return ModelDescription(
        architecture=arch,
        name=name if isinstance(name, str) else "",
        quantization=_quantization(header),
        parameters=sum(t.elements for t in header.tensors),
        layers=number(f"{arch}.block_count"),
        context_tokens=number(f"{arch}.context_length"),
        weight_bytes=sum(t.nbytes for t in header.tensors),
        has_chat_template=isinstance(header.metadata.get("tokenizer.chat_template"), str),
    )


def _quantization(header: GGUFHeader) -> str:
    """The name of the mix in `general.file_type`, if the tensors bear it out; else of the type that most
    bytes have."""
    sizes: dict[str, int] = {}
    for tensor in header.tensors:
        sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + tensor.nbytes
    majority = max(sizes, key=lambda name: sizes[name], default="unknown")
    claimed = header.metadata.get("general.file_type")
    # bit 10 marks a guessed type (LLAMA_FTYPE_GUESSED)
    mix = FILE_TYPES.get(claimed & ~1024, "") if isinstance(claimed, int) else ""
    stem = "_".join(mix.split("_")[:2])
    return mix if stem and any(name in (stem, mix) for name in sizes) else majority
