"""The workflow log outside the secure process, and what stands in it for clients and prompts.

Clients and prompts are digests under a key of this device, so that neither the log nor the trace repeats them, and two
devices' digests of the same have nothing in common. The log is encrypted and authenticated under a key that is fresh
for every sealing. Knows bytes and keys; does not know what a workflow is.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import struct
from array import array
from collections.abc import Sequence
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ...errors import SessionRefused
from ...sealed.crypto import KEY_BYTES, TAG_BYTES, derive
from ...sealed.keys import DeviceKey
from ...sealed.secret import SecretBytes, wipe, wiping

PREFIX_TOKENS = 32  # of a prompt: shorter ones have no beginning that could repeat
DIGEST_BYTES = 16
MAGIC = b"FLEXWFLW"
VERSION = 1
_SALT_BYTES = 32
_HEAD = struct.Struct("<8sI4x32s32s")  # magic, version, the device's key id, salt
_NONCE = bytes(12)  # the key is fresh


class Digests:
    """What the log has in place of clients and prompts. Thread-safe."""

    def __init__(self, device: DeviceKey) -> None:
        key = device.derive(b"flexserve/v1/workflow-digests")
        self._key = SecretBytes(key)
        wipe(key)

    def client(self, name: str | None) -> str:
        """Empty for a client that gave no name."""
        return "" if name is None else self._digest(b"client\0" + name.encode())

    def prefix(self, model: str, tokens: Sequence[int]) -> str:
        """Of how a prompt for this model begins; empty where it is too short."""
        if len(tokens) < PREFIX_TOKENS:
            return ""
        first = array("i", tokens[:PREFIX_TOKENS]).tobytes()
        return self._digest(b"prefix\0" + model.encode() + b"\0" + first)

    def _digest(self, message: bytes) -> str:
        key = bytearray(self._key.view())
        try:
            return hmac.new(key, message, hashlib.sha256).hexdigest()[: 2 * DIGEST_BYTES]
        finally:
            wipe(key)


def seal_log(log: dict[str, Any], device: DeviceKey, now: float) -> bytes:
    """A log at this Unix time, for this device only."""
    salt = os.urandom(_SALT_BYTES)
    head = _HEAD.pack(MAGIC, VERSION, device.key_id, salt)
    body = json.dumps({"saved_at": now, "log": log}, separators=(",", ":")).encode()
    return head + _cipher(device, salt).encrypt(_NONCE, body, head)


def open_log(data: bytes, device: DeviceKey, now: float) -> tuple[Any, float]:
    """The reverse: a log that may still have any form, and its age in seconds. Raises `SessionRefused`."""
    _require(_HEAD.size + TAG_BYTES <= len(data), "has an impossible size")
    head, sealed = data[: _HEAD.size], data[_HEAD.size :]
    magic, version, device_id, salt = _HEAD.unpack(head)
    _require((magic, version) == (MAGIC, VERSION), "has another format")
    _require(device_id == device.key_id, "was saved by another device")
    try:
        body = json.loads(_cipher(device, salt).decrypt(_NONCE, sealed, head))
    except InvalidTag:
        raise SessionRefused("the saved workflow log is not what this device wrote") from None
    except (ValueError, RecursionError):
        raise SessionRefused("the saved workflow log is no JSON") from None
    _require(isinstance(body, dict) and isinstance(body.get("saved_at"), int | float), "has no time")
    return body.get("log"), max(now - body["saved_at"], 0.0)


def _cipher(device: DeviceKey, salt: bytes) -> AESGCM:
    secret = device.derive(b"flexserve/v1/workflows")
    with wiping():
        key = derive(secret, salt, b"flexserve/v1/workflows-key", KEY_BYTES)
    wipe(secret)
    cipher = AESGCM(bytearray(key))
    wipe(key)
    return cipher


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise SessionRefused(f"the saved workflow log {what}")
