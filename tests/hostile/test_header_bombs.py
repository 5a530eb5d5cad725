"""Attack: a trusted vendor's tool, or the vendor, signs a manifest with impossible numbers. Rule: counts,
lengths, sums and overlaps are checked against limits and against the file before they are used."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from flexserve.errors import ManifestNotAuthentic, SealedMalformed
from flexserve.sealed.reader import SealedModel

from ..sealed_fixtures import Kit, put, resign

META, EMBED, BODY, TENSOR = 496, 536, 576, 616
HUGE = ((1 << 64) - 1, (1 << 63), (1 << 63) - 4096, (1 << 40) + 4096, (1 << 32) * 4096)

BOMBS: dict[str, Callable[[bytearray], None]] = {
    "version 0": put(8, "I", 0),
    "version 2": put(8, "I", 2),
    "reserved": put(12, "I", 1),
    "reserved in the head": put(340, "I", 1),
    "reserved after the wrapped key": put(495, "B", 1),
    "no data offset": put(24, "Q", 0),
    "data offset inside the manifest": put(24, "Q", 616),
    "data offset unaligned": put(24, "Q", 4097),
    "model version 0": put(200, "Q", 0),
    "model version too high": put(200, "Q", 1 << 63),
    "empty model id": put(136, "64s", b""),
    "terminal codes in the model id": put(136, "64s", b"\x1b[2J"),
    "a path as model id": put(136, "64s", b"../../etc/passwd"),
    "text after the end of the model id": put(136, "64s", b"good\0evil"),
    "no ascii in the architecture": put(248, "32s", "läma".encode()),
    "new line in the quantization": put(280, "32s", b"Q8_0\n"),
    "sealed after year 9999": put(224, "Q", 1 << 62),
    "parameters": put(312, "Q", 1 << 63),
    "unknown flag": put(328, "I", 4),
    "no tensors": put(332, "I", 0),
    "tensor count too high": put(332, "I", 65537),
    "tensor count wraps": put(332, "I", 0xFFFFFFFF),
    "tensor count off by one": put(332, "I", 13),
    "segment count too high": put(336, "I", 0xFFFFFFFF),
    "segment count off by one": put(336, "I", 3),
    "gguf smaller than its header": put(232, "Q", 1),
    "gguf too large": put(232, "Q", 1 << 62),
    "image size": put(240, "Q", 4096),
    "regions out of order": put(META, "I", 2),
    "region unknown": put(BODY, "I", 9),
    "unit 0": put(EMBED + 4, "I", 0),
    "unit 1": put(BODY + 4, "I", 1),
    "META in the image": put(META + 8, "Q", 4096),
    "BODY over EMBED": put(BODY + 8, "Q", 0),
    "BODY offset wraps": put(BODY + 8, "Q", (1 << 64) - (1 << 20)),
    "empty META": put(META + 16, "Q", 0),
    "META too long": put(META + 16, "Q", (64 << 20) + 1),
    "EMBED of half pages": put(EMBED + 16, "Q", 2048),
    "empty BODY": put(BODY + 16, "Q", 0),
    "EMBED in the file before META": put(EMBED + 24, "Q", 0),
    "BODY over EMBED in the file": put(BODY + 24, "Q", 8192),
    "region reserved": put(BODY + 36, "I", 1),
    "region segment count": put(EMBED + 32, "I", 0xFFFFFFFF),
    "tensor of no bytes": put(TENSOR + 8, "Q", 0),
    "tensor unaligned": put(TENSOR, "Q", 32),
    "tensor across the end of EMBED": put(TENSOR + 8, "Q", 1 << 20),
    "tensor in the gap": put(TENSOR, "QQ", 512 << 10, 64),
    "tensor outside the image": put(TENSOR, "QQ", 1 << 40, 64),
    "tensor wraps": put(TENSOR, "QQ", (1 << 64) - 64, 128),
    "two tensors at one place": lambda m: m.__setitem__(
        slice(TENSOR, TENSOR + 16), m[TENSOR + 16 : TENSOR + 32]
    ),
}
for _huge in HUGE:
    BOMBS[f"manifest_bytes {_huge}"] = put(16, "Q", _huge)
    BOMBS[f"file_bytes {_huge}"] = put(32, "Q", _huge)
    BOMBS[f"EMBED of {_huge}"] = put(EMBED + 16, "Q", _huge)
    BOMBS[f"BODY of {_huge}"] = put(BODY + 16, "Q", _huge)
    BOMBS[f"tensor of {_huge}"] = put(TENSOR + 8, "Q", _huge)


@pytest.mark.parametrize("name", BOMBS)
def test_a_signed_bomb_is_refused_fast_and_in_little_memory(kit: Kit, flex: Path, name: str) -> None:
    data = kit.data
    flex.write_bytes(resign(data, kit.vendor, BOMBS[name]))
    assert flex.read_bytes() != data
    begin = time.monotonic()
    tracemalloc.start()
    try:
        with flex.open("rb") as file, pytest.raises(SealedMalformed):
            SealedModel.open(file.fileno(), [kit.vendor.public])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - begin < 20


def test_the_same_change_unsigned_is_refused_by_the_signature_or_before(kit: Kit, flex: Path) -> None:
    for change in BOMBS.values():
        data = bytearray(kit.data)
        change(data)
        flex.write_bytes(data)
        with flex.open("rb") as file, pytest.raises((SealedMalformed, ManifestNotAuthentic)):
            SealedModel.open(file.fileno(), [kit.vendor.public])


def test_resigning_alone_is_no_reason_to_refuse(kit: Kit, flex: Path) -> None:
    flex.write_bytes(resign(kit.data, kit.vendor, lambda _: None))
    with flex.open("rb") as file:
        assert SealedModel.open(file.fileno(), [kit.vendor.public]).manifest == kit.manifest


def test_a_vendor_key_that_is_no_point_is_refused(kit: Kit, flex: Path) -> None:
    from flexserve.sealed.crypto import id_of

    for point in (bytes(64), b"\xff" * 64, kit.vendor.public.point[::-1]):
        flex.write_bytes(kit.data[:40] + id_of(point) + point + kit.data[136:])
        with flex.open("rb") as file, pytest.raises(SealedMalformed, match="not a point"):
            SealedModel.open(file.fileno(), [kit.vendor.public])
