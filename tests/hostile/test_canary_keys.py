"""Root looks for keys in the memory of a secure process that is at rest.

Rule: the device's key and the segments' keys are in memfd_secret memory, which not even root reads through /proc, and
whatever copies libraries made of them were overwritten (sealed/secret.py). The model's key is nowhere. While a segment
is decrypted, the key's schedule is in ordinary memory; the threat model says so.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexserve.core import Finished, Request, Sampling
from flexserve.sealed import secret
from flexserve.sealed.crypto import SegmentCipher, derive
from flexserve.sealed.keys import DeviceKey
from flexserve.sealed.reader import read_manifest
from flexserve.sealed.secret import SLOT_BYTES, SecretBytes, wipe
from flexserve.worlds.base import ModelSource
from flexserve.worlds.linux import LinuxWorld
from flexserve.worlds.linux.users import may_change_user

from ..attacker import memory_which
from ..sealed_fixtures import model_key
from ..world_fixtures import Device, linux_world

needs_root = pytest.mark.skipif(
    not may_change_user(), reason="only root can look into a hardened process at all"
)
needs_memfd_secret = pytest.mark.skipif(
    not (SecretBytes(b"x") and secret.is_secret()), reason="this kernel has no memfd_secret"
)


@pytest.fixture(scope="module")
def keys(device: Device, source: ModelSource) -> dict[str, bytes]:
    key = model_key(source.sealed, device.vendor)
    fd = os.open(source.sealed, os.O_RDONLY)
    sealing_id = read_manifest(fd).manifest.sealing_id
    os.close(fd)
    return {
        "device": device.key.secret,
        "model": key,
        "segment": derive(key, sealing_id, b"flexserve/v1/segment-key"),
    }


def fragments(key: bytes) -> dict[str, bytes]:
    """What of a key can lie about: halves, as the C library overwrites the beginning of what is freed; in both byte
    orders, as big numbers have them; and in the text of a key file."""
    return {
        "first half": key[:16],
        "second half": key[16:],
        "first half of a number": key[::-1][:16],
        "second half of a number": key[::-1][16:],
        "text": base64.b64encode(key)[16:40],
    }


def answered(world: LinuxWorld) -> int:
    """Have it answer once; its process id."""
    request = Request(
        id="a",
        model="m",
        token_ids=(1, 2, 3),
        max_tokens=4,
        ignore_eos=True,
        sampling=Sampling(temperature=0),
    )
    *_, last = world.generate(request)
    assert isinstance(last, Finished)
    assert world.pid is not None
    return world.pid


def found(pid: int, keys: dict[str, bytes]) -> set[tuple[str, str]]:
    pieces = {part: (name, what) for name, key in keys.items() for what, part in fragments(key).items()}
    return {pieces[part] for part in memory_which(pid, pieces)}


@pytest.fixture(scope="module")
def at_rest(device: Device, source: ModelSource) -> Iterator[LinuxWorld]:
    with linux_world(device) as world:
        world.register(source)
        yield world


@needs_root
@needs_memfd_secret
def test_root_finds_no_key_in_a_secure_process_at_rest(at_rest: LinuxWorld, keys: dict[str, bytes]) -> None:
    assert found(answered(at_rest), keys) == set()


@needs_root
def test_control_root_finds_keys_in_ordinary_memory(
    device: Device, source: ModelSource, keys: dict[str, bytes]
) -> None:
    with linux_world(device, hardened=False) as world:
        world.register(source)
        names = {name for name, _ in found(answered(world), keys)}
    assert names >= {"device", "segment"}


def test_a_secret_is_kept_and_its_slot_is_zeroed_when_nobody_needs_it() -> None:
    kept = SecretBytes(b"k" * SLOT_BYTES)
    slot = kept._slot
    assert bytes(kept.view()) == b"k" * SLOT_BYTES
    with pytest.raises(TypeError):
        kept.view()[0] = 0
    del kept
    assert bytes(slot) == bytes(SLOT_BYTES)


def test_bytes_are_wiped_where_they_are() -> None:
    for data in (bytes(bytearray(b"secret" * 5)), bytearray(b"secret" * 5)):
        wipe(data)
        assert data == bytes(30)


def test_a_cipher_that_rested_still_decrypts() -> None:
    cipher = SegmentCipher(b"k" * 32, b"s" * 32, b"m" * 64, 1)
    out, back = bytearray(32), bytearray(16)
    for _ in range(2):
        cipher.encrypt_into(1, 7, b"plaintext 16 byt", 16, out)
        cipher.rest()
        cipher.decrypt_into(1, 7, out, 16, back)
        assert back == b"plaintext 16 byt"


def test_a_device_key_opens_what_was_wrapped_for_it_again_and_again() -> None:
    key = DeviceKey.generate()
    same = DeviceKey.from_secret(key.secret)
    assert same.key_id == key.key_id
    for _ in range(2):
        assert same.unwrap(key.public.wrap(b"m" * 32, b"info"), b"info") == b"m" * 32
    assert same.derive(b"x") == key.derive(b"x") != key.derive(b"y")
    with pytest.raises(ValueError, match="32 bytes"):
        DeviceKey.from_secret(b"short")
    with pytest.raises(ValueError, match=r".*"):
        DeviceKey.from_secret(bytes(32))


def test_without_memfd_secret_ordinary_memory_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret, "_SYS_MEMFD_SECRET", 100_000)  # ENOSYS
    monkeypatch.setattr(secret, "_vault", secret._Vault())
    kept = SecretBytes(b"key")
    assert not secret.is_secret()
    assert bytes(kept.view()) == b"key"
    del kept
