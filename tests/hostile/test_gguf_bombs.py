"""Attack: a trusted vendor signs a sealed model whose inside is hostile. Rule: META is parsed only after
it is authenticated, with limits; the tensor map must be the one that META implies."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path

import pytest

from flexserve.errors import FlexServeError, ModelMalformed
from flexserve.sealed.format import RegionKind

from ..sealed.gguf_bytes import ARRAY, STRING, U8, U32, File, Key, Weight, tiny_model
from ..sealed_fixtures import Kit, full_check, license_for, put, resign, seal_unchecked

MODEL = tiny_model()
NESTED = struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 100_000

BOMBS: dict[str, bytes] = {
    "no gguf": b"x" * 5000,
    "nothing but a magic": b"GGUF".ljust(100, b"\0"),
    "the 49 bytes that hang a common reader": b"GGUF"
    + struct.pack("<IQQ", 3, 0, 1)
    + struct.pack("<Q1sI", 1, b"k", ARRAY)
    + struct.pack("<IQ", U8, 1 << 60),
    "arrays in arrays": b"GGUF" + struct.pack("<IQQQ1s", 3, 0, 1, 1, b"k") + NESTED,
    "2^64 - 1 keys": File(MODEL.keys, MODEL.weights, key_count=(1 << 64) - 1).to_bytes(),
    "2^63 tensors": File(MODEL.keys, MODEL.weights, weight_count=1 << 63).to_bytes(),
    "an array of 2^60 strings": File(
        (*MODEL.keys, Key("x", ARRAY, (), STRING, 1 << 60)), MODEL.weights
    ).to_bytes(),
    "shape that wraps around": MODEL.with_weight(
        Weight("token_embd.weight", (1 << 32, 1 << 32), nbytes=64)
    ).to_bytes(),
    "tensor beyond the end": MODEL.with_weight(
        Weight("output_norm.weight", (64,), offset=1 << 50)
    ).to_bytes(),
    "two tensors at one place": MODEL.with_weight(Weight("output_norm.weight", (64,), offset=0)).to_bytes(),
    "unknown type": MODEL.with_weight(Weight("output_norm.weight", (64,), 200, nbytes=256)).to_bytes(),
    "alignment 0": MODEL.with_key("general.alignment", U32, 0).to_bytes(),
    "no embedding": MODEL.without_weight("token_embd.weight").to_bytes(),
    "no architecture": MODEL.without_key("general.architecture").to_bytes(),
}


@pytest.mark.parametrize("name", BOMBS)
def test_an_authentic_bomb_is_refused_as_a_model_fast_and_in_little_memory(
    kit: Kit, flex: Path, name: str
) -> None:
    seal_unchecked(BOMBS[name], flex, kit.vendor)
    licence = license_for(flex, kit.vendor, kit.device)
    begin = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(ModelMalformed):
            full_check(flex, licence, kit.device, [kit.vendor.public])
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - begin < 20


def test_an_honest_model_through_the_same_tool_is_accepted(kit: Kit, flex: Path) -> None:
    seal_unchecked(MODEL.to_bytes(), flex, kit.vendor)
    full_check(flex, license_for(flex, kit.vendor, kit.device), kit.device, [kit.vendor.public])


def test_a_tensor_map_that_is_not_the_models_is_refused(kit: Kit, flex: Path) -> None:
    body = kit.manifest.region(RegionKind.BODY)
    last = max(range(len(kit.manifest.tensors)), key=lambda i: kit.manifest.tensors[i])
    offset, length = kit.manifest.tensors[last]
    assert offset + length + 64 <= body.image_offset + body.length
    flex.write_bytes(resign(kit.data, kit.vendor, put(616 + 16 * last, "QQ", offset, length - 4)))
    with pytest.raises(ModelMalformed, match="tensor map"):
        full_check(flex, license_for(flex, kit.vendor, kit.device), kit.device, [kit.vendor.public])


def test_another_gguf_size_than_the_header_implies_is_refused(kit: Kit, flex: Path) -> None:
    size = kit.manifest.gguf_bytes
    for other in (size - 4096, size + 4096, 1 << 40):
        flex.write_bytes(resign(kit.data, kit.vendor, put(232, "Q", other)))
        with pytest.raises(ModelMalformed):
            full_check(flex, license_for(flex, kit.vendor, kit.device), kit.device, [kit.vendor.public])


def test_random_changes_inside_an_authentic_header_never_end_in_anything_but_an_answer(
    kit: Kit, flex: Path
) -> None:
    rng = random.Random(3)
    data = kit.gguf.read_bytes()
    size = kit.manifest.region(RegionKind.META).length
    outcomes = {"accepted": 0, "refused": 0}
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(size)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        seal_unchecked(bytes(changed), flex, kit.vendor)
        licence = license_for(flex, kit.vendor, kit.device)
        try:
            full_check(flex, licence, kit.device, [kit.vendor.public])
            outcomes["accepted"] += 1  # a changed letter in a token, say: what the vendor signed
        except FlexServeError:
            outcomes["refused"] += 1
    assert all(outcomes.values()), outcomes
