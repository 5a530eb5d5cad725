"""The cryptography of docs/sealed-format.md: P-256 points, signatures, wrapped keys, the segment cipher.

Knows primitives and their inputs only: no file, no field offsets, no policy. Every function here is a few
lines around the `cryptography` library; failures are that library's `InvalidTag` or a bool, and the caller,
who knows what failed, raises our errors.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import weakref

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.utils import Buffer

from .secret import SecretBytes, wipe, wiping

KEY_BYTES = 32
TAG_BYTES = 16
POINT_BYTES = 64
SIGNATURE_BYTES = 64
WRAPPED_KEY_BYTES = 113

CURVE_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_SPKI_PREFIX = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")
_INDEX_AND_LENGTH = struct.Struct("<QQ").pack
_HPKE = Suite(KEM.P256, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def point_of(key: ec.EllipticCurvePublicKey) -> bytes:
    """X || Y, 64 bytes."""
    return key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]


def key_of(point: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a point. Raises `ValueError` when it is not on the curve."""
    return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + point)


def id_of(point: bytes) -> bytes:
    """SHA-256 of the key's SubjectPublicKeyInfo, 32 bytes."""
    return hashlib.sha256(_SPKI_PREFIX + point).digest()


def sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """ECDSA with SHA-256 as `r || s`, the smaller of the two possible `s`."""
    r, s = utils.decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + min(s, CURVE_ORDER - s).to_bytes(32, "big")


def signature_fits(key: ec.EllipticCurvePublicKey, signature: bytes, message: bytes) -> bool:
    """Whether `signature` is the one valid form of a signature of `message`."""
    if len(signature) != SIGNATURE_BYTES:
        return False
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    if not 1 <= r < CURVE_ORDER or not 1 <= s <= CURVE_ORDER // 2:
        return False
    try:
        key.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def wrap(key: ec.EllipticCurvePublicKey, model_key: bytes, info: bytes) -> bytes:
    """HPKE in base mode: 113 bytes that only the holder of the private key opens, with the same `info`."""
    return _HPKE.encrypt(model_key, key, info)


def unwrap(key: ec.EllipticCurvePrivateKey, wrapped: bytes, info: bytes) -> bytes:
    """The reverse of `wrap`. Raises `cryptography.exceptions.InvalidTag`."""
    return _HPKE.decrypt(wrapped, key, info)


def derive(ikm: Buffer, salt: bytes, info: bytes, length: int = KEY_BYTES) -> bytes:
    """HKDF-SHA256."""
    return HKDF(hashes.SHA256(), length, salt, info).derive(ikm)


def key_commitment(model_key: bytes, sealing_id: bytes) -> bytes:
    """What the manifest says of its model key, 32 bytes."""
    return derive(model_key, sealing_id, b"flexserve/v1/key-commitment")


def commits_to(commitment: bytes, model_key: bytes, sealing_id: bytes) -> bool:
    return hmac.compare_digest(commitment, key_commitment(model_key, sealing_id))


class SegmentCipher:
    """Encrypts and decrypts the segments of one sealing. Thread-safe; both directions release the GIL."""

    __slots__ = ("__weakref__", "_aad", "_aead", "_key")

    def __init__(
        self,
        model_key: bytes,
        sealing_id: bytes,
        model_id: bytes,
        model_version: int,
        magic: bytes = b"FLEXSEAL",
    ) -> None:
        """`model_id` is the 64-byte field; `magic` the file's."""
        with wiping():
            key = derive(model_key, sealing_id, b"flexserve/v1/segment-key")
        self._key = SecretBytes(key)
        wipe(key)
        self._aead: AESGCM | None = None  # with the key's schedule in ordinary memory
        _ciphers.add(self)
        # The constant part of the associated data, by region kind.
        self._aad = [struct.pack("<8sII64sQ", magic, 1, kind, model_id, model_version) for kind in range(4)]

    def encrypt_into(self, kind: int, index: int, plaintext: Buffer, length: int, out: Buffer) -> None:
        """`out` takes ciphertext and tag: `length` + 16 bytes."""
        aad = self._aad[kind] + _INDEX_AND_LENGTH(index, length)
        (self._aead or self._ready()).encrypt_into(index.to_bytes(12, "little"), plaintext, aad, out)

    def decrypt_into(self, kind: int, index: int, ciphertext: Buffer, length: int, out: Buffer) -> None:
        """`ciphertext` ends with the tag. Raises `InvalidTag`, and then `out` holds unauthenticated bytes."""
        aad = self._aad[kind] + _INDEX_AND_LENGTH(index, length)
        (self._aead or self._ready()).decrypt_into(index.to_bytes(12, "little"), ciphertext, aad, out)

    def _ready(self) -> AESGCM:
        key = bytearray(self._key.view())
        aead = AESGCM(key)
        wipe(key)  # the library has its schedule, and keeps the object only
        self._aead = aead
        return aead

    def rest(self) -> None:
        """Forget the key's schedule until it is needed again; whoever uses it now is not disturbed."""
        self._aead = None


_ciphers: weakref.WeakSet[SegmentCipher] = weakref.WeakSet()


def rest_ciphers() -> None:
    """Let all of this process rest: when an answer has ended, nobody decrypts for a while."""
    for cipher in list(_ciphers):
        cipher.rest()
