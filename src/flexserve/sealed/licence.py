"""Licences: a model key wrapped for one device and signed by the vendor (docs/sealed-format.md, "Licence").

Knows the 360 bytes, who may write them and in which order a device believes them. Does no I/O.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from cryptography.exceptions import InvalidTag

from ..errors import (
    KeyProblem,
    LicenceExpired,
    LicenceMalformed,
    LicenceNotAuthentic,
    LicenceWrongDevice,
    LicenceWrongModel,
)
from .crypto import KEY_BYTES, SIGNATURE_BYTES
from .format import FORMAT_VERSION, MAX_INTEGER, MAX_TIME, decode_name, encode_name
from .keys import DeviceKey, DevicePublicKey, VendorKey, VendorPublicKey
from .reader import SealedModel
from .state import DeviceState

MAGIC = b"FLEXLICN"
NEVER = (1 << 64) - 1
_FIELDS = struct.Struct("<8sII64sQ32s32sQQQ")
_WRAP = struct.Struct("<113s7s")
SIGNED_BYTES = _FIELDS.size + _WRAP.size
LICENCE_BYTES = SIGNED_BYTES + SIGNATURE_BYTES
assert LICENCE_BYTES == 360


@dataclass(frozen=True)
class Licence:
    """The fields of a licence. Times are seconds since 1970; parsing says nothing about authenticity."""

    model_id: str
    model_version: int
    manifest_digest: bytes
    device_key_id: bytes
    issued_at: int
    expires_at: int  # NEVER, or the last second in which it is valid
    serial: int
    wrapped_key: bytes
    signature: bytes = bytes(SIGNATURE_BYTES)

    @property
    def info(self) -> bytes:
        """The HPKE info: every field that the wrapped key is bound to."""
        return _FIELDS.pack(
            *(MAGIC, FORMAT_VERSION, 0, encode_name(self.model_id), self.model_version, self.manifest_digest),
            *(self.device_key_id, self.issued_at, self.expires_at, self.serial),
        )

    @property
    def signed_bytes(self) -> bytes:
        return self.info + _WRAP.pack(self.wrapped_key, b"")

    def encode(self) -> bytes:
        return self.signed_bytes + self.signature

    @classmethod
    def parse(cls, data: bytes) -> Licence:
        """Raises `LicenceMalformed`."""
        if not data.startswith(MAGIC):
            raise LicenceMalformed("this is not a licence: it does not begin with FLEXLICN")
        if len(data) != LICENCE_BYTES:
            raise LicenceMalformed(f"the licence has {len(data)} bytes; a licence has {LICENCE_BYTES}")
        _, version, reserved, name, model_version, digest, device, issued, expires, serial = (
            _FIELDS.unpack_from(data)
        )
        wrapped, padding = _WRAP.unpack_from(data, _FIELDS.size)
        model_id = decode_name(name)
        if version != FORMAT_VERSION:
            raise LicenceMalformed(
                f"the licence has format version {version}; this FlexServe reads version {FORMAT_VERSION}"
            )
        if reserved or any(padding):
            raise LicenceMalformed("the licence's reserved fields are not zero")
        if model_id is None or not 1 <= model_version <= MAX_INTEGER:
            raise LicenceMalformed("the licence's model id or version is impossible")
        if issued > MAX_TIME or (expires > MAX_TIME and expires != NEVER):
            raise LicenceMalformed("the licence's times are impossible")
        if not 1 <= serial <= MAX_INTEGER:
            raise LicenceMalformed(f"the licence's serial is {serial}")
        return cls(
            *(model_id, model_version, digest, device, issued, expires, serial, wrapped),
            data[SIGNED_BYTES:],
        )


def issue(
    sealed: SealedModel,
    vendor: VendorKey,
    device: DevicePublicKey,
    *,
    issued_at: int,
    serial: int,
    expires_at: int = NEVER,
) -> bytes:
    """Write a licence for one of the vendor's own sealed models.

    Raises `KeyProblem` when the model was sealed with another key, `LicenceMalformed` for times or serials
    outside the format's limits.
    """
    m = sealed.manifest
    try:
        model_key = vendor.unwrap(m.vendor_wrap, m.vendor_wrap_info)
    except InvalidTag:
        raise KeyProblem(f"{m.model_id} was sealed with another sealing key than this vendor's") from None
    sealed.unlock(model_key)  # the commitment: a licence that opens nothing must not leave the house
    fields = Licence(
        model_id=m.model_id,
        model_version=m.model_version,
        manifest_digest=sealed.digest,
        device_key_id=device.key_id,
        issued_at=issued_at,
        expires_at=expires_at,
        serial=serial,
        wrapped_key=b"",
    )
    wrapped = replace(fields, wrapped_key=device.wrap(model_key, fields.info))
    data = wrapped.signed_bytes + vendor.sign(wrapped.signed_bytes)
    Licence.parse(data)
    return data


def check_signature(licence: Licence, vendor: VendorPublicKey) -> None:
    """Raises `LicenceNotAuthentic`."""
    if not vendor.signed(licence.signature, licence.signed_bytes):
        raise LicenceNotAuthentic(
            f"the licence is not signed by vendor {vendor.key_id.hex()}, who signed the model",
            hint="it was changed, or belongs to another vendor's model: get it from the vendor again",
        )


def open_licence(
    data: bytes, sealed: SealedModel, device: DeviceKey, state: bytes | None, now: float
) -> tuple[bytes, bytes]:
    """Believe a licence: the model key, and the new device state to store.

    `state` is the device state as stored, None on a new device; `now` is seconds since 1970. Nothing is
    recorded unless everything was accepted. Raises `LicenceMalformed`, `LicenceNotAuthentic`,
    `LicenceWrongModel`, `LicenceWrongDevice`, `StateNotAuthentic`, `RolledBack`, `LicenceExpired`, in the
    order of docs/sealed-format.md, "Licence".
    """
    licence = Licence.parse(data)
    check_signature(licence, sealed.vendor)
    m = sealed.manifest
    if (licence.model_id, licence.model_version) != (m.model_id, m.model_version):
        raise LicenceWrongModel(
            f"the licence is for {licence.model_id} version {licence.model_version}, "
            f"not for {m.model_id} version {m.model_version}"
        )
    if licence.manifest_digest != sealed.digest:
        raise LicenceWrongModel(
            f"the licence is for another sealing of {m.model_id} version {m.model_version}"
        )
    if licence.device_key_id != device.key_id:
        raise LicenceWrongDevice(
            f"the licence is for device {licence.device_key_id.hex()}; this device is {device.key_id.hex()}"
        )
    known = DeviceState.decode(state, device)
    known.check(m, sealed.digest, licence.serial)
    clock = known.clock(int(now))
    if clock > licence.expires_at:
        seen = "" if clock == int(now) else " (the latest time this device has seen)"
        raise LicenceExpired(
            f"the licence for {m.model_id} was valid until {utc(licence.expires_at)}; "
            f"it is {utc(clock)}{seen}"
        )
    try:
        model_key = device.unwrap(licence.wrapped_key, licence.info)
    except InvalidTag:
        raise LicenceNotAuthentic("the key inside the licence does not open with this device's key") from None
    if len(model_key) != KEY_BYTES:
        raise LicenceNotAuthentic(f"the key inside the licence has {len(model_key)} bytes")
    sealed.unlock(model_key)  # the manifest's commitment
    return model_key, known.accept(m, sealed.digest, licence.serial, int(now)).encode(device)


def utc(seconds: int) -> str:
    """ISO 8601 in UTC, `never` for NEVER."""
    if seconds == NEVER:
        return "never"
    return datetime.fromtimestamp(min(seconds, MAX_TIME), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
