"""What a device remembers against rollback: the newest version, licence and time it has accepted.

Bytes in, bytes out (docs/sealed-format.md, "Device state"): the normal world stores them (statefile.py), a
key of the device authenticates them. Knows nothing of files, clocks or licences' content.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from ..errors import RolledBack, StateNotAuthentic, StorageFailure
from .format import FORMAT_VERSION, MAX_TIME, Manifest, encode_name
from .keys import DeviceKey

MAGIC = b"FLEXSTAT"
MAX_ENTRIES = 1024
_HEAD = struct.Struct("<8sIIQ")
_ENTRY = struct.Struct("<32s64sQ32sQ")
_MAC_BYTES = 32
MAX_STATE_BYTES = _HEAD.size + MAX_ENTRIES * _ENTRY.size + _MAC_BYTES
_INFO = b"flexserve/v1/device-state"


class Entry(NamedTuple):
    """One sealing this device has opened."""

    vendor_key_id: bytes
    model_id: bytes  # the 64-byte field
    model_version: int
    manifest_digest: bytes
    serial: int


@dataclass(frozen=True)
class DeviceState:
    """All entries of one (vendor, model id) have the same version: the highest one accepted."""

    highest_time: int = 0
    entries: tuple[Entry, ...] = ()

    @classmethod
    def decode(cls, blob: bytes | None, device: DeviceKey) -> DeviceState:
        """None is the state of a new device. Raises `StateNotAuthentic`."""
        if blob is None:
            return cls()
        body, mac = blob[:-_MAC_BYTES], blob[-_MAC_BYTES:]
        if len(blob) > MAX_STATE_BYTES or not hmac.compare_digest(mac, _mac(device, body)):
            raise StateNotAuthentic("the device's state file was not written with this device's key")
        # The device wrote what follows; it is checked all the same, because a check is cheaper than a doubt.
        if len(body) < _HEAD.size:
            raise StateNotAuthentic("the device's state file is too short")
        magic, version, count, highest_time = _HEAD.unpack_from(body)
        entries = [body[i : i + _ENTRY.size] for i in range(_HEAD.size, len(body), _ENTRY.size)]
        if (magic, version, count) != (MAGIC, FORMAT_VERSION, len(entries)) or highest_time > MAX_TIME:
            raise StateNotAuthentic("the device's state file has an impossible head")
        ascending = all(a < b for a, b in pairwise(entries))
        if count > MAX_ENTRIES or len(body) != _HEAD.size + count * _ENTRY.size or not ascending:
            raise StateNotAuthentic("the device's state file has impossible entries")
        state = cls(highest_time, tuple(Entry(*_ENTRY.unpack(e)) for e in entries))
        if len({e[:3] for e in state.entries}) != len({e[:2] for e in state.entries}):
            raise StateNotAuthentic("the device's state file has two versions of one model")
        return state

    def encode(self, device: DeviceKey) -> bytes:
        entries = sorted(_ENTRY.pack(*entry) for entry in self.entries)
        head = _HEAD.pack(MAGIC, FORMAT_VERSION, len(entries), self.highest_time)
        body = head + b"".join(entries)
        return body + _mac(device, body)

    def clock(self, now: int) -> int:
        """The later of `now` and the highest time seen; seconds since 1970."""
        return max(now, self.highest_time)

    def check(self, manifest: Manifest, digest: bytes, serial: int) -> None:
        """Raises `RolledBack` when something newer was accepted before."""
        for entry in self.entries:
            if entry[:2] != (manifest.vendor_key_id, encode_name(manifest.model_id)):
                continue
            if manifest.model_version < entry.model_version:
                raise RolledBack(
                    f"{manifest.model_id} has version {manifest.model_version}; this device has already used "
                    f"version {entry.model_version}"
                )
            if entry.manifest_digest == digest and serial < entry.serial:
                raise RolledBack(
                    f"the licence for {manifest.model_id} has serial {serial}; this device has already used "
                    f"serial {entry.serial}"
                )

    def accept(self, manifest: Manifest, digest: bytes, serial: int, now: int) -> DeviceState:
        """The state after a licence that `check` let pass. Raises `StorageFailure` when it is full."""
        model = (manifest.vendor_key_id, encode_name(manifest.model_id))
        new = Entry(*model, manifest.model_version, digest, serial)
        kept = [
            entry
            for entry in self.entries
            if entry[:2] != model
            or (entry.model_version == manifest.model_version and entry.manifest_digest != digest)
        ]
        if len(kept) >= MAX_ENTRIES:
            raise StorageFailure(
                f"the device's state file is full: it remembers {MAX_ENTRIES} models",
                hint="delete it to forget them all, and with them the protection against older ones",
            )
        return DeviceState(min(self.clock(now), MAX_TIME), tuple(sorted([*kept, new])))


def _mac(device: DeviceKey, body: bytes) -> bytes:
    return hmac.new(device.derive(_INFO), body, hashlib.sha256).digest()
