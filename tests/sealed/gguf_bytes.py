"""A GGUF writer of a few lines that writes anything, right or wrong: the tests' opposite of gguf.py."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flexserve.sealed.ggml_types import TENSOR_TYPES

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q"}
_FORMATS[F64] = "d"


@dataclass(frozen=True)
class Key:
    name: str | bytes
    type: int
    value: Any
    element: int | None = None  # of an array
    count: int | None = None  # what the file says an array's length is; None: the truth


@dataclass(frozen=True)
class Weight:
    name: str | bytes
    shape: tuple[int, ...]
    type: int = 0
    offset: int | None = None  # what the file says; None: the right one
    nbytes: int | None = None


@dataclass(frozen=True)
class File:
    keys: tuple[Key, ...] = ()
    weights: tuple[Weight, ...] = ()
    magic: bytes = b"GGUF"
    version: int = 3
    key_count: int | None = None
    weight_count: int | None = None
    alignment: int = 32
    data: bytes | None = None  # None: zeros, padded
    extra: bytes = field(default=b"")

    def with_key(self, name: str, kind: int, value: Any, element: int | None = None) -> File:
        kept = tuple(k for k in self.keys if k.name != name)
        return replace(self, keys=(*kept, Key(name, kind, value, element)))

    def without_key(self, name: str) -> File:
        return replace(self, keys=tuple(k for k in self.keys if k.name != name))

    def with_weight(self, weight: Weight) -> File:
        changed = tuple(weight if w.name == weight.name else w for w in self.weights)
        if weight not in changed:
            changed += (weight,)
        return replace(self, weights=changed)

    def without_weight(self, name: str) -> File:
        return replace(self, weights=tuple(w for w in self.weights if w.name != name))

    def header(self) -> bytes:
        out = [
            self.magic,
            struct.pack(
                "<IQQ",
                self.version,
                len(self.weights) if self.weight_count is None else self.weight_count,
                len(self.keys) if self.key_count is None else self.key_count,
            ),
        ]
        out += (_key(key) for key in self.keys)
        end = 0
        for weight in self.weights:
            out.append(_string(weight.name) + struct.pack("<I", len(weight.shape)))
            out.append(struct.pack(f"<{len(weight.shape)}Q", *weight.shape))
            out.append(struct.pack("<IQ", weight.type, end if weight.offset is None else weight.offset))
            end += nbytes(weight)
            end += -end % self.alignment
        return b"".join(out)

    def to_bytes(self) -> bytes:
        header = self.header()
        header += bytes(-len(header) % self.alignment)
        if self.data is not None:
            return header + self.data + self.extra
        size = sum(n + -n % self.alignment for n in map(nbytes, self.weights))
        return header + bytes(size) + self.extra


def nbytes(weight: Weight) -> int:
    if weight.nbytes is not None:
        return weight.nbytes
    kind = TENSOR_TYPES[weight.type]
    size = weight.shape[0] // kind.block * kind.block_bytes
    for n in weight.shape[1:]:
        size *= n
    return size


def _string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: int, value: Any) -> bytes:
    return _string(value) if kind == STRING else struct.pack("<" + _FORMATS[kind], value)


def _key(key: Key) -> bytes:
    head = _string(key.name) + struct.pack("<I", key.type)
    if key.type != ARRAY:
        return head + (
            key.value if isinstance(key.value, bytes) and key.type != STRING else _value(key.type, key.value)
        )
    assert key.element is not None
    count = len(key.value) if key.count is None else key.count
    head += struct.pack("<IQ", key.element, count)
    return head + b"".join(_value(key.element, v) for v in key.value)


def strings(name: str, values: Sequence[str | bytes]) -> Key:
    return Key(name, ARRAY, values, STRING)


def tiny_model(arch: str = "llama", *, layers: int = 1, tied: bool = False) -> File:
    """A model that passes every rule: width 64, 4 heads of 16, a vocabulary of 300 tokens."""
    width, hidden, head, vocabulary = 64, 96, 16, 300
    tokens = [chr(256 + i) for i in range(vocabulary)]
    keys = (
        Key("general.architecture", STRING, arch),
        Key(f"{arch}.block_count", U32, layers),
        Key(f"{arch}.context_length", U32, 512),
        Key(f"{arch}.embedding_length", U32, width),
        Key(f"{arch}.feed_forward_length", U32, hidden),
        Key(f"{arch}.attention.head_count", U32, width // head),
        Key(f"{arch}.attention.head_count_kv", U32, 2),
        Key(f"{arch}.attention.layer_norm_rms_epsilon", F32, 1e-5),
        Key(f"{arch}.rope.dimension_count", U32, head),
        Key("tokenizer.ggml.model", STRING, "gpt2"),
        strings("tokenizer.ggml.tokens", tokens),
        Key("tokenizer.ggml.token_type", ARRAY, [1] * vocabulary, I32),
        strings("tokenizer.ggml.merges", [f"{tokens[0]} {tokens[1]}"]),
        Key("tokenizer.ggml.bos_token_id", U32, 1),
        Key("tokenizer.ggml.eos_token_id", U32, 2),
        Key("tokenizer.chat_template", STRING, "{{ messages[0].content }}"),
    )
    weights = [Weight("token_embd.weight", (width, vocabulary))]
    for i in range(layers):
        weights += [
            Weight(f"blk.{i}.attn_norm.weight", (width,)),
            Weight(f"blk.{i}.attn_q.weight", (width, width)),
            Weight(f"blk.{i}.attn_k.weight", (width, 2 * head)),
            Weight(f"blk.{i}.attn_v.weight", (width, 2 * head)),
            Weight(f"blk.{i}.attn_output.weight", (width, width)),
            Weight(f"blk.{i}.ffn_norm.weight", (width,)),
            Weight(f"blk.{i}.ffn_gate.weight", (width, hidden)),
            Weight(f"blk.{i}.ffn_up.weight", (width, hidden)),
            Weight(f"blk.{i}.ffn_down.weight", (hidden, width)),
        ]
    weights.append(Weight("output_norm.weight", (width,)))
    if not tied:
        weights.append(Weight("output.weight", (width, vocabulary)))
    return File(keys, tuple(weights))
