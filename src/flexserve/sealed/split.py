"""Joins the parts of a split GGUF model into one header, without copying any weight.

Knows the naming (`NAME-00001-of-00003.gguf`) and the keys (`split.no`, `split.count`, `split.tensors.count`) that
llama-gguf-split writes: the first part has the metadata, every part has some tensors. The joined model is one
ordinary GGUF model: nothing of the split is left in what is sealed.
"""

from __future__ import annotations

import re
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelMalformed, NotFound, Usage
from .files import opened
from .gguf import GGUFHeader, TensorInfo, parse_header, read_header

MAX_PARTS = 999
_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})(\.gguf)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """A model's header and where its tensors' bytes are: `files` are descriptors, and the tensor `i` of the header
    begins at `offsets[i]` of `files[part_of[i]]`."""

    meta: bytes
    header: GGUFHeader
    files: tuple[int, ...]
    part_of: tuple[int, ...]
    offsets: tuple[int, ...]


def open_source(path: Path, stack: ExitStack) -> Source:
    """Open a model, and all its parts when it is the first part of a split one. `stack` closes the files.

    Raises `NotFound`, `StorageFailure`, `ModelMalformed`, and `Usage` for another part than the first.
    """
    first = stack.enter_context(opened(path, "model file"))
    meta, header = read_header(first)
    count = _number(header, "split.count", 1)
    if count <= 1:
        offsets = tuple(header.data_offset + t.offset for t in header.tensors)
        return Source(meta, header, (first,), (0,) * len(offsets), offsets)
    if count > MAX_PARTS:
        raise ModelMalformed(f"key 'split.count' is {count}: at most {MAX_PARTS} parts are possible")
    names = _names(path, header, count)
    parts = [(first, meta, header)]
    for number, name in enumerate(names[1:], 2):
        try:
            file = stack.enter_context(opened(name, "model file"))
        except NotFound:
            raise NotFound(f"part {number} of {count} is missing: there is no file {name}") from None
        parts.append((file, *read_header(file)))
        _check_part(name, parts[-1][2], header, number, count)
    total = sum(len(part.tensors) for _, _, part in parts)
    expected = _number(header, "split.tensors.count", total)
    if total != expected:
        raise ModelMalformed(f"the {count} parts have {total} tensors, and the first says {expected}")
    return _join(parts)


def _names(path: Path, header: GGUFHeader, count: int) -> list[Path]:
    number = _number(header, "split.no", 0) + 1
    match = _NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count or int(match[2]) != number:
        raise Usage(
            f"{path} is part {number} of {count}, but its name does not end in -{number:05}-of-{count:05}.gguf",
            hint="give the parts the names they had: the others are found by them",
        )
    names = [path.with_name(f"{match[1]}-{i:05}-of-{count:05}{match[4]}") for i in range(1, count + 1)]
    if number != 1:
        raise Usage(f"{path} is part {number} of {count}", hint=f"give the first part, {names[0]}")
    return names


def _check_part(path: Path, part: GGUFHeader, first: GGUFHeader, number: int, count: int) -> None:
    found = _number(part, "split.no", -1) + 1, _number(part, "split.count", 0)
    if found != (number, count):
        what = f"part {found[0]} of {found[1]}" if found[0] > 0 else "no part of a split model"
        raise ModelMalformed(f"{path} should be part {number} of {count}, and it is {what}")
    if part.architecture not in ("", first.architecture):
        raise ModelMalformed(f"{path} is of another model: its architecture is {part.architecture!r}")
    if part.alignment != first.alignment:
        raise ModelMalformed(f"{path} has another alignment than the first part")


def _join(parts: list[tuple[int, bytes, GGUFHeader]]) -> Source:
    _, meta, first = parts[0]
    keys = [meta[start:end] for key, (start, end) in first.spans.items() if not key.startswith("split.")]
    out = [b"", *keys]
    tensors, end = 0, 0
    part_of: list[int] = []
    offsets: list[int] = []
    for number, (_, _, header) in enumerate(parts):
        for tensor in header.tensors:
            out.append(_tensor(tensor, end))
            end += tensor.nbytes + -tensor.nbytes % first.alignment
            part_of.append(number)
            offsets.append(header.data_offset + tensor.offset)
        tensors += len(header.tensors)
    out[0] = struct.pack("<4sIQQ", b"GGUF", first.version, tensors, len(keys))
    joined = b"".join(out)
    joined += bytes(-len(joined) % first.alignment)
    header = parse_header(joined, len(joined) + end)  # also finds a tensor that two parts have
    return Source(joined, header, tuple(file for file, _, _ in parts), tuple(part_of), tuple(offsets))


def _tensor(tensor: TensorInfo, offset: int) -> bytes:
    name = tensor.name.encode()
    shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
    return struct.pack("<Q", len(name)) + name + shape + struct.pack("<IQ", tensor.type, offset)


def _number(header: GGUFHeader, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < -1:
        raise ModelMalformed(f"key {key!r} must be a number")
    return value
