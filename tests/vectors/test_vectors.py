"""The vectors, decoded twice: from docs/sealed-format.md alone (struct, hashlib, cryptography and nothing of
ours), and by our own reader."""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from base64 import b64decode
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

HERE = Path(__file__).parent
VECTORS: dict[str, Any] = json.loads((HERE / "vectors.json").read_text())
MODEL, VENDOR, DEVICE = VECTORS["model"], VECTORS["vendor"], VECTORS["device"]
FILE = (HERE / MODEL["file"]).read_bytes()
LICENCE = (HERE / VECTORS["licence"]["file"]).read_bytes()
HPKE = Suite(KEM.P256, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def private(scalar: str) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int(scalar, 16), ec.SECP256R1())


def key_id(key: ec.EllipticCurvePublicKey) -> str:
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def check_signature(message: bytes, signature: bytes) -> None:
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    assert s <= 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551 // 2
    key = private(VENDOR["signing_scalar"]).public_key()
    key.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256()))


def hkdf(ikm: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt, info).derive(ikm)


def up(n: int, a: int) -> int:
    return -(-n // a) * a


def test_keys_have_the_ids_and_derived_keys_of_the_spec() -> None:
    vendor = private(VENDOR["signing_scalar"]).public_key()
    point = vendor.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    assert point[1:].hex() == VENDOR["signing_point"]
    assert key_id(vendor) == VENDOR["key_id"]
    assert key_id(private(DEVICE["scalar"]).public_key()) == DEVICE["key_id"]
    for info, value in DEVICE["derived"].items():
        secret = bytes.fromhex(DEVICE["scalar"])
        assert hkdf(secret, b"flexserve/v1/device-secret", info.encode()).hex() == value


def test_the_sealed_model_decodes_as_the_spec_says() -> None:
    magic, version, reserved, manifest_bytes, data_offset, file_bytes = struct.unpack_from("<8sIIQQQ", FILE)
    assert (magic, version, reserved, file_bytes) == (b"FLEXSEAL", 1, 0, len(FILE))
    assert FILE[40:72].hex() == VENDOR["key_id"]
    assert FILE[72:136].hex() == VENDOR["signing_point"]
    check_signature(FILE[:manifest_bytes], FILE[manifest_bytes : manifest_bytes + 64])
    assert data_offset == up(manifest_bytes + 64, 4096)
    assert FILE[manifest_bytes + 64 : data_offset] == bytes(data_offset - manifest_bytes - 64)
    assert hashlib.sha256(FILE[:manifest_bytes]).hexdigest() == MODEL["manifest_digest"]

    model_id, (model_version,), sealing_id = FILE[136:200], struct.unpack_from("<Q", FILE, 200), FILE[208:224]
    assert (model_id.rstrip(b"\0").decode(), model_version) == (MODEL["model_id"], MODEL["model_version"])
    tensor_count, segment_count = struct.unpack_from("<II", FILE, 332)
    assert manifest_bytes == 616 + 16 * tensor_count + 48 * segment_count
    commitment, vendor_wrap = FILE[344:376], FILE[376:489]
    info = b"FLEXWRAP" + FILE[8:12] + FILE[136:224] + commitment
    model_key = HPKE.decrypt(vendor_wrap, private(VENDOR["sealing_scalar"]), info)
    assert model_key.hex() == MODEL["model_key"]
    assert hkdf(model_key, sealing_id, b"flexserve/v1/key-commitment") == commitment
    segment_key = hkdf(model_key, sealing_id, b"flexserve/v1/segment-key")
    assert segment_key.hex() == MODEL["segment_key"]

    aead, index, image, plaintext = AESGCM(segment_key), 0, bytearray(), {}
    offset = data_offset
    for number, name in enumerate(("META", "EMBED", "BODY")):
        kind, unit, image_offset, length, file_offset, count, _ = struct.unpack_from(
            "<IIQQQII", FILE, 496 + 40 * number
        )
        assert (kind, file_offset) == (number + 1, offset)
        offset += up(length, 4096)
        region = b""
        for i in range(count):
            start = file_offset + i * unit
            size = min(unit, up(length, 4096) - i * unit)
            ciphertext = FILE[start : start + size]
            entry = 616 + 16 * tensor_count + 48 * index
            assert hashlib.sha256(ciphertext).digest() == FILE[entry + 16 : entry + 48]
            aad = struct.pack("<8sII64sQQQ", b"FLEXSEAL", 1, kind, model_id, model_version, index, size)
            assert len(aad) == 104
            nonce = struct.pack("<QI", index, 0)
            region += aead.decrypt(nonce, ciphertext + FILE[entry : entry + 16], aad)
            index += 1
        assert not any(region[length:])
        plaintext[name] = region[:length]
        assert hashlib.sha256(region[:length]).hexdigest() == MODEL["plaintext_sha256"][name]
        if name != "META":
            image = image.ljust(image_offset, b"\0") + region[:length]
    assert (index, offset) == (segment_count, len(FILE))
    assert struct.unpack_from("<Q", FILE, 240) == (len(image),)

    gguf = bytearray(plaintext["META"])
    for number, tensor in enumerate(MODEL["tensors"]):
        start, length = struct.unpack_from("<QQ", FILE, 616 + 16 * number)
        assert start == tensor["image_offset"]
        assert hashlib.sha256(image[start : start + length]).hexdigest() == tensor["sha256"]
        gguf += image[start : start + length]
        gguf += bytes(-len(gguf) % 32)
    assert hashlib.sha256(gguf).hexdigest() == MODEL["gguf_sha256"]


def test_the_licence_decodes_as_the_spec_says() -> None:
    assert len(LICENCE) == 360
    check_signature(LICENCE[:296], LICENCE[296:])
    fields = struct.unpack_from("<8sII64sQ32s32sQQQ", LICENCE)
    magic, version, reserved, model_id, model_version, digest, device, issued, expires, serial = fields
    assert (magic, version, reserved) == (b"FLEXLICN", 1, 0)
    assert (model_id, model_version) == (FILE[136:200], MODEL["model_version"])
    assert (digest.hex(), device.hex()) == (MODEL["manifest_digest"], DEVICE["key_id"])
    assert {"serial": serial, "issued_at": issued, "expires_at": expires, "file": "tiny.lic"} == VECTORS[
        "licence"
    ]
    key = HPKE.decrypt(LICENCE[176:289], private(DEVICE["scalar"]), LICENCE[:176])
    assert key.hex() == MODEL["model_key"]
    assert LICENCE[289:296] == bytes(7)


def test_the_device_state_decodes_as_the_spec_says() -> None:
    blob = bytes.fromhex(VECTORS["state"]["blob"])
    key = bytes.fromhex(DEVICE["derived"]["flexserve/v1/device-state"])
    assert hmac.digest(key, blob[:-32], "sha256") == blob[-32:]
    assert struct.unpack_from("<8sIIQ", blob) == (b"FLEXSTAT", 1, 1, VECTORS["state"]["highest_time"])
    vendor, model_id, version, digest, serial = struct.unpack("<32s64sQ32sQ", blob[24:-32])
    assert (vendor, model_id) == (FILE[40:72], FILE[136:200])
    assert (version, digest.hex(), serial) == (7, MODEL["manifest_digest"], 42)


@pytest.mark.parametrize("vector", VECTORS["key_files"])
def test_key_files_decode_as_the_spec_says(vector: dict[str, Any]) -> None:
    file = json.loads(vector["content"])
    assert set(file) == {"format", "version", "kind", "kdf", "key"}
    assert (file["format"], file["version"], file["kind"]) == ("flexserve-key", 1, vector["kind"])
    secret = b64decode(file["key"])
    if (kdf := file["kdf"]) is not None:
        key = Scrypt(b64decode(kdf["salt"]), 32, 1 << kdf["log2_n"], kdf["r"], kdf["p"]).derive(
            vector["passphrase"].encode()
        )
        aad = f"flexserve-key/1/{vector['kind']}/scrypt/{kdf['log2_n']}/8/1/{kdf['salt']}".encode()
        secret = AESGCM(key).decrypt(secret[:12], secret[12:], aad)
    assert secret.hex() == vector["secret"]


def our_answer(file: bytes, licence: bytes, tmp_path: Path) -> str:
    """`accepted`, or the code of our refusal; the device state is the one after the right licence."""
    from flexserve.errors import FlexServeError
    from flexserve.sealed.keys import DeviceKey, VendorPublicKey

    from ..sealed_fixtures import full_check

    path = tmp_path / "m.flex"
    path.write_bytes(file)
    device = DeviceKey.from_secret(bytes.fromhex(DEVICE["scalar"]))
    vendor = VendorPublicKey.from_point(bytes.fromhex(VENDOR["signing_point"]))
    state = bytes.fromhex(VECTORS["state"]["blob"])
    try:
        full_check(path, licence, device, [vendor], state=state, now=VECTORS["now"])
    except FlexServeError as error:
        return error.code
    return "accepted"


def test_our_reader_accepts_the_vectors(tmp_path: Path) -> None:
    assert our_answer(FILE, LICENCE, tmp_path) == "accepted"


@pytest.mark.parametrize("case", VECTORS["reject_model"], ids=lambda case: case["why"])
def test_our_reader_refuses_each_bad_model_with_its_code(case: dict[str, Any], tmp_path: Path) -> None:
    from flexserve.errors import ModelMalformed
    from flexserve.sealed.keys import DeviceKey, VendorKey

    from ..sealed_fixtures import license_for

    data = bytearray(FILE)
    for offset, patch in case["patches"]:
        data[offset : offset + len(patch) // 2] = bytes.fromhex(patch)
    licence = LICENCE
    if case["code"] == ModelMalformed.code:
        # the digest is another one: this file has a licence of its own, so that its inside is looked at
        vendor = VendorKey.from_secret(bytes.fromhex(VENDOR["signing_scalar"] + VENDOR["sealing_scalar"]))
        device = DeviceKey.from_secret(bytes.fromhex(DEVICE["scalar"]))
        path = tmp_path / "changed.flex"
        path.write_bytes(data)
        licence = license_for(path, vendor, device)
    assert our_answer(bytes(data), licence, tmp_path) == case["code"]


@pytest.mark.parametrize("case", VECTORS["reject_licence"], ids=lambda case: case["why"])
def test_our_reader_refuses_each_bad_licence_with_its_code(case: dict[str, Any], tmp_path: Path) -> None:
    assert our_answer(FILE, bytes.fromhex(case["licence"]), tmp_path) == case["code"]


def answer(passphrase: bytes, _source: str) -> bytes:
    return passphrase


def test_our_key_files_open() -> None:
    from flexserve.sealed.keyfile import decode_key

    for vector in VECTORS["key_files"]:
        passphrase = (vector["passphrase"] or "").encode()
        secret = decode_key(vector["content"].encode(), vector["kind"], "v", partial(answer, passphrase))
        assert secret.hex() == vector["secret"]
