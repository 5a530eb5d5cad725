"""The two kinds of keys, both P-256: a vendor's (signing and sealing) and a device's.

Knows what each key is for; does not know where keys are kept (keyfile.py, trust.py).
"""

from __future__ import annotations

from typing import Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_private_key,
    load_pem_public_key,
)

from ..errors import KeyProblem
from . import crypto
from .secret import SecretBytes, wipe, wiping

# ECPrivateKey of RFC 5915, without the public point, around the 32 bytes of the scalar.
_DER_BEFORE = bytes.fromhex("30310201010420")
_DER_AFTER = bytes.fromhex("a00a06082a8648ce3d030107")
_SECRET_SALT = b"flexserve/v1/device-secret"


class _PublicKey:
    """A P-256 public key. Two are equal when their ids are."""

    what = "public key"

    def __init__(self, key: ec.EllipticCurvePublicKey) -> None:
        self._key = key
        self.point = crypto.point_of(key)
        self.key_id = crypto.id_of(self.point)

    @classmethod
    def from_pem(cls, pem: bytes, source: str) -> Self:
        """Read a `.pub` file's content; `source` names it in errors. Raises `KeyProblem`."""
        try:
            key = load_pem_public_key(pem)
        except (ValueError, UnsupportedAlgorithm):
            hint = "this looks like a secret key: give the .pub file" if b"flexserve-key" in pem else None
            raise KeyProblem(f"{source} is not a public key in PEM", hint=hint) from None
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise KeyProblem(f"{source} is not a P-256 public key")
        return cls(key)

    @classmethod
    def from_point(cls, point: bytes) -> Self:
        """Raises `KeyProblem` when the point is not on the curve."""
        try:
            return cls(crypto.key_of(point))
        except ValueError:
            raise KeyProblem(f"the {cls.what} is not a point of P-256") from None

    @property
    def pem(self) -> bytes:
        return self._key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.key_id == self.key_id

    def __hash__(self) -> int:
        return hash(self.key_id)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.key_id.hex()})"


class VendorPublicKey(_PublicKey):
    """What a device knows of a vendor: the key that signs sealed models and licences."""

    what = "vendor's public key"

    def signed(self, signature: bytes, message: bytes) -> bool:
        """Whether `signature` is this vendor's signature of `message`."""
        return crypto.signature_fits(self._key, signature, message)


class DevicePublicKey(_PublicKey):
    """What a vendor knows of a device."""

    what = "device's public key"

    def wrap(self, model_key: bytes, info: bytes) -> bytes:
        """113 bytes that only this device opens."""
        return crypto.wrap(self._key, model_key, info)


class VendorKey:
    """A vendor's secret: one key signs, the other reads back the model keys of the vendor's own files."""

    def __init__(self, signing: ec.EllipticCurvePrivateKey, sealing: ec.EllipticCurvePrivateKey) -> None:
        self._signing = signing
        self._sealing = sealing
        self.public = VendorPublicKey(signing.public_key())

    @classmethod
    def generate(cls) -> Self:
        return cls(ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def from_secret(cls, secret: bytes) -> Self:
        """From the 64 bytes of a key file. Raises `ValueError`."""
        return cls(_private(secret[:32]), _private(secret[32:]))

    @property
    def secret(self) -> bytes:
        return _scalar(self._signing) + _scalar(self._sealing)

    def sign(self, message: bytes) -> bytes:
        """64 bytes, `r || s` with the smaller `s`."""
        return crypto.sign(self._signing, message)

    def wrap(self, model_key: bytes, info: bytes) -> bytes:
        """Wrap a model key to the sealing key."""
        return crypto.wrap(self._sealing.public_key(), model_key, info)

    def unwrap(self, wrapped: bytes, info: bytes) -> bytes:
        """The reverse of `wrap`. Raises `cryptography.exceptions.InvalidTag`."""
        return crypto.unwrap(self._sealing, wrapped, info)


class DeviceKey:
    """A device's secret: opens licences, and everything the device derives for itself comes from it.

    Kept in secret memory; in ordinary memory only while it is used.
    """

    def __init__(self, secret: SecretBytes) -> None:
        """Raises `ValueError`."""
        self._secret = secret
        self.public = DevicePublicKey(self._key().public_key())

    @classmethod
    def generate(cls) -> Self:
        return cls(SecretBytes(_scalar(ec.generate_private_key(ec.SECP256R1()))))

    @classmethod
    def from_secret(cls, secret: bytes) -> Self:
        """From the 32 bytes of a key file. Raises `ValueError`."""
        if len(secret) != 32:
            raise ValueError("a P-256 scalar has 32 bytes")
        return cls(SecretBytes(secret))

    @property
    def key_id(self) -> bytes:
        return self.public.key_id

    @property
    def secret(self) -> bytes:
        return bytes(self._secret.view())

    def unwrap(self, wrapped: bytes, info: bytes) -> bytes:
        """The reverse of `DevicePublicKey.wrap`. Raises `cryptography.exceptions.InvalidTag`."""
        with wiping():
            return crypto.unwrap(self._key(), wrapped, info)

    def derive(self, info: bytes, length: int = 32) -> bytes:
        """A key of this device for one purpose, named by `info` (state file, saved sessions)."""
        with wiping():
            return crypto.derive(self._secret.view(), _SECRET_SALT, info, length)

    def _key(self) -> ec.EllipticCurvePrivateKey:
        """For one use. From DER and not from a number: Python's integers cannot be wiped."""
        der = bytearray(_DER_BEFORE + bytes(32) + _DER_AFTER)
        der[len(_DER_BEFORE) : -len(_DER_AFTER)] = self._secret.view()
        try:
            with wiping():
                key = load_der_private_key(der, None)
        finally:
            wipe(der)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key


def _private(scalar: bytes) -> ec.EllipticCurvePrivateKey:
    if len(scalar) != 32:
        raise ValueError("a P-256 scalar has 32 bytes")
    return ec.derive_private_key(int.from_bytes(scalar, "big"), ec.SECP256R1())


def _scalar(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_numbers().private_value.to_bytes(32, "big")
