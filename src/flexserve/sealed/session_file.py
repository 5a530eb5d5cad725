"""A saved session: one conversation's KV in a file (docs/sealed-format.md, "Saved session").

Knows the file's bytes, its key and when it may be believed. Does not know what is in the state (engine.sessions) nor
when one is saved. Whatever is wrong with a file is one error, `SessionRefused`, because the answer is always the
same: the tokens are computed again.
"""

from __future__ import annotations

import array
import os
import re
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..errors import SealedTruncated, SessionRefused, StorageFailure
from .crypto import KEY_BYTES, TAG_BYTES, derive
from .files import pwrite_all
from .keys import DeviceKey
from .reader import pread_exact
from .secret import wipe, wiping

MAGIC = b"FLEXSESS"
FORMAT_VERSION = 1
SUFFIX = ".flexkv"
CHUNK_BYTES = 1 << 20
SALT_BYTES = 32
TEXT_BYTES = 64
MAX_TOKENS = 1 << 20
MAX_STATE_BYTES = 1 << 37
MAX_NAME_BYTES = 512
MAX_INDEX_BYTES = 12 + MAX_NAME_BYTES + 8 * MAX_TOKENS

_HEAD = struct.Struct("<8sIIQQ32s32s32s64s64s")
HEAD_BYTES = 256
assert _HEAD.size == HEAD_BYTES
_INDEX = struct.Struct("<III")
_NUMBER_AND_LENGTH = struct.Struct("<QQ").pack
_TEXT = re.compile(rb"[ -~]+\0*")


@dataclass(frozen=True)
class MadeBy:
    """What a state is good for: the sealing of the model, the engine and the parameters of its context."""

    source_digest: bytes  # of the sealed model's manifest
    engine: str
    context: str


@dataclass(frozen=True)
class Tokens:
    """What a state is the state of. `batches`: how many of the tokens were computed at once each time, in order."""

    ids: array.array[int]  # "i"
    batches: array.array[int]
    name: str = ""  # the client's own, where it gave one


@dataclass(frozen=True)
class SavedSession:
    """An authentic index, and the file that has its state. Nothing of the state was read yet."""

    tokens: Tokens
    made_by: MadeBy
    state_bytes: int
    salt: bytes
    _head: bytes
    _key: Callable[[], bytes]

    def read_state(self, fd: int, out: memoryview) -> None:
        """Fill `out` (`state_bytes`) chunk by chunk: read, authenticate, decrypt. What it holds may be used only when
        this returns: after an error the caller zeroes it.

        Raises `SessionRefused`.
        """
        assert len(out) == self.state_bytes
        staging = memoryview(bytearray(min(CHUNK_BYTES, self.state_bytes) + TAG_BYTES))
        cipher = _cipher(self._key())
        at = HEAD_BYTES + _index_bytes(self._head) + TAG_BYTES
        for number, start in enumerate(range(0, self.state_bytes, CHUNK_BYTES), 1):
            length = min(CHUNK_BYTES, self.state_bytes - start)
            _read(fd, staging[: length + TAG_BYTES], at)
            try:
                cipher.decrypt_into(
                    _nonce(number),
                    staging[: length + TAG_BYTES],
                    _aad(self._head, number, length),
                    out[start : start + length],
                )
            except InvalidTag:
                raise SessionRefused(f"chunk {number} of the saved session was changed") from None
            at += length + TAG_BYTES


def write(fd: int, tokens: Tokens, state: memoryview, made_by: MadeBy, device: DeviceKey) -> int:
    """Write a session under a fresh key into an empty file; returns the file's size. Raises `StorageFailure`."""
    salt = os.urandom(SALT_BYTES)
    index = _encode_index(tokens)
    head = _HEAD.pack(
        *(MAGIC, FORMAT_VERSION, 0, len(index), len(state), device.key_id, made_by.source_digest, salt),
        *(_text(made_by.engine), _text(made_by.context)),
    )
    cipher = _cipher(_key(device, salt))
    out = memoryview(bytearray(max(len(index), min(CHUNK_BYTES, len(state))) + TAG_BYTES))
    at = 0
    try:
        pwrite_all(fd, head, at)
        at += len(head)
        pieces = [memoryview(index)]
        pieces += [state[i : i + CHUNK_BYTES] for i in range(0, len(state), CHUNK_BYTES)]
        for number, piece in enumerate(pieces):
            sealed = out[: len(piece) + TAG_BYTES]
            cipher.encrypt_into(_nonce(number), piece, _aad(head, number, len(piece)), sealed)
            pwrite_all(fd, sealed, at)
            at += len(sealed)
    except OSError as error:
        raise StorageFailure(f"cannot write a saved session: {error.strerror}") from error
    finally:
        wipe(index)
    return at


def open_session(fd: int, device: DeviceKey) -> SavedSession:
    """The index of a saved session, authentic. Whether it fits a model is `SavedSession.made_by`'s to say.

    Raises `SessionRefused`.
    """
    head = bytearray(HEAD_BYTES)
    try:
        info = os.fstat(fd)
    except OSError as error:
        raise SessionRefused(f"the saved session cannot be read: {error.strerror}") from error
    _require(stat.S_ISREG(info.st_mode), "is not a regular file")
    _read(fd, memoryview(head), 0)
    magic, version, reserved, index_bytes, state_bytes, device_id, source, salt, engine, context = (
        _HEAD.unpack(head)
    )
    _require((magic, version, reserved) == (MAGIC, FORMAT_VERSION, 0), "has another format")
    _require(device_id == device.key_id, "was saved by another device")
    _require(_INDEX.size <= index_bytes <= MAX_INDEX_BYTES, "has an impossible index")
    _require(1 <= state_bytes <= MAX_STATE_BYTES, "has an impossible size")
    _require(info.st_size == file_bytes(index_bytes, state_bytes), "has not the size it says it has")
    _require(all(_TEXT.fullmatch(t) for t in (engine, context)), "names no engine")
    data = bytearray(index_bytes + TAG_BYTES)
    _read(fd, memoryview(data), HEAD_BYTES)
    index, sealed_head = bytearray(index_bytes), bytes(head)
    try:
        aad = _aad(sealed_head, 0, index_bytes)
        _cipher(_key(device, salt)).decrypt_into(_nonce(0), data, aad, index)
    except InvalidTag:
        raise SessionRefused("the saved session is not what this device wrote") from None
    made_by = MadeBy(source, engine.rstrip(b"\0").decode(), context.rstrip(b"\0").decode())
    tokens = _decode_index(index)
    wipe(index)
    return SavedSession(tokens, made_by, state_bytes, salt, sealed_head, lambda: _key(device, salt))


def file_bytes(index_bytes: int, state_bytes: int) -> int:
    """The size of a file."""
    chunks = -(-state_bytes // CHUNK_BYTES)
    return HEAD_BYTES + index_bytes + TAG_BYTES + state_bytes + chunks * TAG_BYTES


def _encode_index(tokens: Tokens) -> bytearray:
    name = tokens.name.encode()
    head = _INDEX.pack(len(tokens.ids), len(tokens.batches), len(name))
    return bytearray(head + name + _numbers(tokens.ids) + _numbers(tokens.batches))


def _decode_index(index: bytearray) -> Tokens:
    """Every rule, on authentic bytes: the device wrote them, and checking is cheaper than doubting."""
    count, batch_count, name_bytes = _INDEX.unpack_from(index)
    _require(1 <= batch_count <= count <= MAX_TOKENS and name_bytes <= MAX_NAME_BYTES, "has no tokens")
    ends = [_INDEX.size + name_bytes]
    ends += [ends[0] + 4 * count, ends[0] + 4 * (count + batch_count)]
    _require(len(index) == ends[2], "has an index of another size")
    ids, batches = _array(index[ends[0] : ends[1]]), _array(index[ends[1] :])
    _require(min(ids) >= 0 and min(batches) > 0 and sum(batches) == count, "has impossible tokens")
    try:
        return Tokens(ids, batches, index[_INDEX.size : ends[0]].decode())
    except UnicodeDecodeError:
        raise SessionRefused("the saved session has a name that is no text") from None


def _numbers(numbers: array.array[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}i", *numbers)


def _array(data: bytearray) -> array.array[int]:
    return array.array("i", struct.unpack(f"<{len(data) // 4}i", data))


def _text(text: str) -> bytes:
    data = text.encode("ascii")
    assert 1 <= len(data) <= TEXT_BYTES
    return data.ljust(TEXT_BYTES, b"\0")


def _index_bytes(head: bytes) -> int:
    return int(_HEAD.unpack(head)[3])


def _key(device: DeviceKey, salt: bytes) -> bytes:
    secret = device.derive(b"flexserve/v1/session")
    with wiping():
        key = derive(secret, salt, b"flexserve/v1/session-key", KEY_BYTES)
    wipe(secret)
    return key


def _cipher(key: bytes) -> AESGCM:
    cipher = AESGCM(bytearray(key))
    wipe(key)
    return cipher


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")


def _aad(head: bytes, number: int, length: int) -> bytes:
    return head + _NUMBER_AND_LENGTH(number, length)


def _read(fd: int, buffer: memoryview, offset: int) -> None:
    try:
        pread_exact(fd, buffer, offset)
    except (StorageFailure, SealedTruncated):
        raise SessionRefused("the saved session cannot be read to its end") from None


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise SessionRefused(f"the saved session {what}")
