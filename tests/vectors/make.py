"""Makes the test vectors: `python tests/vectors/make.py` (with src on the path) replaces tiny.flex, tiny.lic and
vectors.json beside it. Signatures and wrapped keys are random, so every run gives other bytes with the same
meaning. All keys in here are public on purpose."""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexserve.bench.generate import write_model
from flexserve.bench.shapes import ModelShape
from flexserve.sealed import crypto
from flexserve.sealed.format import RegionKind
from flexserve.sealed.gguf import parse_header
from flexserve.sealed.keyfile import MIN_SCRYPT_LOG2_N, encode_key
from flexserve.sealed.keys import DeviceKey, VendorKey
from flexserve.sealed.licence import NEVER, Licence, issue, open_licence
from flexserve.sealed.reader import SealedModel
from flexserve.sealed.seal import seal
from flexserve.sealed.state import DeviceState

HERE = Path(__file__).parent
SHAPE = ModelShape("vector", "llama", 1, 64, 64, 2, 1, 32, 288, 128, 10000.0, 1e-5, False)
NOW = 1_800_000_000
VENDOR = VendorKey.from_secret(bytes(range(1, 65)))
DEVICE = DeviceKey.from_secret(bytes(range(101, 133)))
OTHER = VendorKey.from_secret(bytes(range(64, 0, -1)))
PASSPHRASE = "correct horse battery staple"


def resigned(data: bytes, change: Callable[[bytearray], None], vendor: VendorKey = VENDOR) -> list[list[Any]]:
    """Patches that make a changed manifest with a signature that fits it."""
    (end,) = struct.unpack_from("<Q", data, 16)
    manifest = bytearray(data[:end])
    change(manifest)
    first = next(i for i in range(end) if manifest[i] != data[i])
    last = next(i for i in reversed(range(end)) if manifest[i] != data[i]) + 1
    return [[first, manifest[first:last].hex()], [end, vendor.sign(bytes(manifest)).hex()]]


def flip(data: bytes, at: int) -> list[list[Any]]:
    return [[at, f"{data[at] ^ 1:02x}"]]


def put(offset: int, layout: str, *values: int | bytes) -> Callable[[bytearray], None]:
    return lambda manifest: struct.pack_into("<" + layout, manifest, offset, *values)


def other_s(signature: bytes) -> bytes:
    s = int.from_bytes(signature[32:], "big")
    return signature[:32] + (crypto.CURVE_ORDER - s).to_bytes(32, "big")


def model_rejects(data: bytes, sealed: SealedModel) -> list[dict[str, Any]]:
    plan = sealed.manifest.plan
    end, embed, body = plan.manifest_bytes, plan.regions[1], plan.regions[2]
    first, second = (sealed.segments[embed.first_segment + i] for i in range(2))
    there = data[first.file_offset : first.file_offset + 4096]
    here = data[second.file_offset : second.file_offset + 4096]

    def case(why: str, code: str, patches: list[list[Any]]) -> dict[str, Any]:
        return {"why": why, "code": code, "patches": patches}

    def signed(
        why: str, change: Callable[[bytearray], None], code: str = "sealed_malformed"
    ) -> dict[str, Any]:
        return case(why + ", signed again", code, resigned(data, change))

    stranger = put(40, "32s64s", OTHER.public.key_id, OTHER.public.point)
    return [
        case("magic", "sealed_malformed", flip(data, 0)),
        case("file_bytes", "sealed_wrong_size", flip(data, 33)),
        case("vendor_key_id", "sealed_malformed", flip(data, 40)),
        case("model_id", "manifest_not_authentic", flip(data, 136)),
        case("a tag", "manifest_not_authentic", flip(data, end - 48)),
        case("a hash", "manifest_not_authentic", flip(data, end - 1)),
        case("large s", "manifest_not_authentic", [[end, other_s(data[end : end + 64]).hex()]]),
        case("padding", "sealed_malformed", flip(data, plan.data_offset - 1)),
        case("META", "segment_not_authentic", flip(data, plan.data_offset)),
        case("BODY", "segment_not_authentic", flip(data, plan.file_bytes - 1)),
        case(
            "two segments swapped in part",
            "segment_not_authentic",
            [[first.file_offset, here.hex()], [second.file_offset, there.hex()]],
        ),
        case("another vendor", "vendor_not_trusted", resigned(data, stranger, OTHER)),
        case("signed by another key", "manifest_not_authentic", resigned(data, put(200, "Q", 2), OTHER)),
        signed("format version 2", put(8, "I", 2)),
        signed("reserved byte", put(495, "B", 1)),
        signed("model version 0", put(200, "Q", 0)),
        signed("control character in the model id", put(136, "64s", b"a\x1b[2J")),
        signed("bytes after the end of a name", put(136, "64s", b"a\0b")),
        signed("unknown flag", put(328, "I", 4)),
        signed("tensor count that wraps around", put(332, "I", 0xFFFFFFFF)),
        signed("image size", put(240, "Q", body.image_offset)),
        signed("BODY over EMBED in the image", put(576 + 8, "Q", 0)),
        signed("BODY over META in the file", put(576 + 24, "Q", plan.data_offset)),
        signed("BODY of 2^64 - 4096 bytes", put(576 + 16, "Q", (1 << 64) - 4096)),
        signed("a tensor that wraps around", put(616, "QQ", (1 << 64) - 64, 128)),
        signed("a tensor across EMBED's end", put(616, "QQ", 0, embed.length + 64)),
        signed("overlapping tensors", put(632, "Q", body.image_offset + 64)),
        signed("a tensor map that META does not imply", put(624, "Q", 64), "model_malformed"),
    ]


def licence_rejects(licence: Licence) -> list[dict[str, Any]]:
    def case(why: str, code: str, data: bytes) -> dict[str, Any]:
        return {"why": why, "code": code, "licence": data.hex()}

    def signed(why: str, code: str, changed: Licence, *, wrap: bool = False) -> dict[str, Any]:
        if wrap:
            changed = replace(changed, wrapped_key=DEVICE.public.wrap(bytes(32), changed.info))
        return case(why + ", signed again", code, changed.signed_bytes + VENDOR.sign(changed.signed_bytes))

    data = licence.encode()
    zero = bytes(32)
    return [
        case("one byte too few", "licence_malformed", data[:-1]),
        case("one byte too many", "licence_malformed", data + b"\0"),
        case("magic", "licence_malformed", b"X" + data[1:]),
        case("reserved byte", "licence_malformed", data[:295] + b"\1" + data[296:]),
        case("serial", "licence_not_authentic", data[:168] + b"\x09" + data[169:]),
        case("large s", "licence_not_authentic", data[:296] + other_s(data[296:])),
        case("another signer", "licence_not_authentic", data[:296] + OTHER.sign(data[:296])),
        signed("another model", "licence_wrong_model", replace(licence, model_id="another")),
        signed("another sealing", "licence_wrong_model", replace(licence, manifest_digest=zero)),
        signed("another device", "licence_wrong_device", replace(licence, device_key_id=zero)),
        signed("expired", "licence_expired", replace(licence, expires_at=NOW - 1)),
        signed("old serial", "rolled_back", replace(licence, serial=licence.serial - 1)),
        signed(
            "info is not that of the wrapped key", "licence_not_authentic", replace(licence, expires_at=NEVER)
        ),
        signed("a key against the commitment", "licence_not_authentic", licence, wrap=True),
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        gguf_path = Path(directory) / "m.gguf"
        write_model(SHAPE, "Q8_0", gguf_path)
        gguf = gguf_path.read_bytes()
        seal(gguf_path, HERE / "tiny.flex", VENDOR, "vector-1", 7)
    data = (HERE / "tiny.flex").read_bytes()
    with (HERE / "tiny.flex").open("rb") as file:
        sealed = SealedModel.open(file.fileno(), [VENDOR.public])
        m = sealed.manifest
        licence = issue(sealed, VENDOR, DEVICE.public, issued_at=NOW - 9, serial=42, expires_at=NOW + 9)
        model_key, state = open_licence(licence, sealed, DEVICE, None, NOW)
        unlocked = sealed.unlock(model_key)
        plaintext = {kind.name: unlocked.read_region(kind) for kind in RegionKind}
    (HERE / "tiny.lic").write_bytes(licence)
    header = parse_header(gguf, len(gguf))
    vectors = {
        "about": "test vectors of docs/sealed-format.md; every key in here is public on purpose. Each reject_model "
        "case is refused with tiny.lic; for model_malformed write a licence for the changed file first.",
        "now": NOW,
        "vendor": {
            "signing_scalar": VENDOR.secret[:32].hex(),
            "sealing_scalar": VENDOR.secret[32:].hex(),
            "signing_point": VENDOR.public.point.hex(),
            "key_id": VENDOR.public.key_id.hex(),
        },
        "device": {
            "scalar": DEVICE.secret.hex(),
            "key_id": DEVICE.key_id.hex(),
            "derived": {"flexserve/v1/device-state": DEVICE.derive(b"flexserve/v1/device-state").hex()},
        },
        "model": {
            "file": "tiny.flex",
            "model_id": m.model_id,
            "model_version": m.model_version,
            "manifest_digest": sealed.digest.hex(),
            "model_key": model_key.hex(),
            "segment_key": crypto.derive(model_key, m.sealing_id, b"flexserve/v1/segment-key").hex(),
            "key_commitment": m.key_commitment.hex(),
            "plaintext_sha256": {k: hashlib.sha256(v).hexdigest() for k, v in plaintext.items()},
            "gguf_sha256": hashlib.sha256(gguf).hexdigest(),
            "tensors": [
                {
                    "name": t.name,
                    "image_offset": place.image_offset,
                    "sha256": hashlib.sha256(gguf[header.data_offset + t.offset :][: t.nbytes]).hexdigest(),
                }
                for t, place in zip(header.tensors, m.tensors, strict=True)
            ],
        },
        "licence": {"file": "tiny.lic", "serial": 42, "issued_at": NOW - 9, "expires_at": NOW + 9},
        "state": {"blob": state.hex(), "highest_time": DeviceState.decode(state, DEVICE).highest_time},
        "key_files": [
            {"kind": kind, "passphrase": passphrase, "secret": secret.hex(), "content": content.decode()}
            for kind, secret, passphrase, content in (
                ("vendor", VENDOR.secret, None, encode_key("vendor", VENDOR.secret, None, 0)),
                (
                    "device",
                    DEVICE.secret,
                    PASSPHRASE,
                    encode_key("device", DEVICE.secret, PASSPHRASE.encode(), MIN_SCRYPT_LOG2_N),
                ),
            )
        ],
        "reject_model": model_rejects(data, sealed),
        "reject_licence": licence_rejects(Licence.parse(licence)),
    }
    (HERE / "vectors.json").write_text(json.dumps(vectors, indent=1) + "\n")


if __name__ == "__main__":
    main()
