from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from flexserve.errors import (
    FlexServeError,
    KeyPermissions,
    KeyProblem,
    NotFound,
    PassphraseWrong,
    Usage,
)
from flexserve.sealed import crypto
from flexserve.sealed.keyfile import (
    MIN_SCRYPT_LOG2_N,
    check_secret_file,
    decode_key,
    encode_key,
    load_device_key,
    load_vendor_key,
    read_passphrase_file,
    write_key,
)
from flexserve.sealed.keys import DeviceKey, DevicePublicKey, VendorKey, VendorPublicKey
from flexserve.sealed.trust import TrustStore

VENDOR, DEVICE = VendorKey.generate(), DeviceKey.generate()


@given(st.binary(max_size=200))
def test_every_signature_has_exactly_one_valid_form(message: bytes) -> None:
    signature = VENDOR.sign(message)
    r, s = signature[:32], int.from_bytes(signature[32:], "big")
    assert s <= crypto.CURVE_ORDER // 2
    assert VENDOR.public.signed(signature, message)
    twin = r + (crypto.CURVE_ORDER - s).to_bytes(32, "big")
    for other in (twin, signature + b"\0", signature[:-1], bytes(64), b"\xff" * 64):
        assert not VENDOR.public.signed(other, message)
    assert not VENDOR.public.signed(signature, message + b"x")


def test_a_wrapped_key_opens_only_with_its_info_and_its_device() -> None:
    wrapped = DEVICE.public.wrap(b"k" * 32, b"info")
    assert len(wrapped) == crypto.WRAPPED_KEY_BYTES
    assert DEVICE.unwrap(wrapped, b"info") == b"k" * 32
    for device, info in ((DEVICE, b"other"), (DeviceKey.generate(), b"info")):
        with pytest.raises(InvalidTag):
            device.unwrap(wrapped, info)


def test_derived_keys_differ_by_purpose_and_by_device() -> None:
    assert len({DEVICE.derive(b"a"), DEVICE.derive(b"b"), DeviceKey.generate().derive(b"a")}) == 3
    assert DEVICE.derive(b"a") == DeviceKey.from_secret(DEVICE.secret).derive(b"a")
    assert len(DEVICE.derive(b"a", 64)) == 64


def test_key_ids_are_the_hash_of_the_der_that_openssl_writes() -> None:
    import hashlib

    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert VendorPublicKey(key).key_id == hashlib.sha256(der).digest()


def test_keys_show_no_secret_when_printed() -> None:
    shown = f"{VENDOR!r} {DEVICE!r} {VENDOR.public!r} {DEVICE.public!r}"
    assert VENDOR.secret.hex()[:16] not in shown
    assert DEVICE.secret.hex()[:16] not in shown


def test_key_files_are_private_never_overwritten_and_load_as_the_same_key(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        vendor = write_key(tmp_path / "vendor.key", VENDOR)
        device = write_key(tmp_path / "device", DEVICE)
    finally:
        os.umask(old)
    assert (vendor.public.name, device.public.name) == ("vendor.pub", "device.pub")
    assert stat.S_IMODE(vendor.secret.stat().st_mode) == 0o600
    assert load_vendor_key(vendor.secret).secret == VENDOR.secret
    assert load_device_key(device.secret).secret == DEVICE.secret
    assert VendorPublicKey.from_pem(vendor.public.read_bytes(), "v") == VENDOR.public
    for path in (vendor.secret, vendor.public.with_suffix(".key")):
        with pytest.raises(Usage, match="exists already"):
            write_key(path, VendorKey.generate())
    vendor.secret.unlink()
    with pytest.raises(Usage, match=r"vendor\.pub exists already"):
        write_key(vendor.secret, VendorKey.generate())
    assert not vendor.secret.exists()


def test_a_symlink_is_no_place_for_a_new_key(tmp_path: Path) -> None:
    (tmp_path / "vendor.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Usage):
        write_key(tmp_path / "vendor.key", VENDOR)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666, 0o777])
def test_a_secret_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = write_key(tmp_path / "device.key", DEVICE).secret
    path.chmod(mode)
    with pytest.raises(KeyPermissions, match=f"mode {mode:04o}"):
        load_device_key(path)


def test_a_secret_of_another_user_is_refused(tmp_path: Path) -> None:
    path = write_key(tmp_path / "device.key", DEVICE).secret
    fields = list(path.stat())
    fields[stat.ST_UID] = os.geteuid() + 1
    with pytest.raises(KeyPermissions, match="belongs to user"):
        check_secret_file(os.stat_result(fields), path, credential=False)
    with pytest.raises(KeyPermissions, match="belongs to user"):
        check_secret_file(os.stat_result(fields), path, credential=True)


def test_a_key_that_may_not_be_read_is_a_matter_of_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_key(tmp_path / "device.key", DEVICE).secret

    def denied(*_: object) -> int:  # root may read everything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(KeyPermissions, match="you may not read") as caught:
        load_device_key(path)
    assert "belong to the user" in caught.value.hint


def test_a_passphrase_opens_and_only_the_right_one(tmp_path: Path) -> None:
    path = write_key(tmp_path / "v.key", VENDOR, b"correct horse", log2_n=MIN_SCRYPT_LOG2_N).secret
    assert VENDOR.secret not in path.read_bytes()
    asked: list[str] = []

    def ask(source: str) -> bytes:
        asked.append(source)
        return b"correct horse"

    assert load_vendor_key(path, ask).secret == VENDOR.secret
    assert asked == [str(path)]
    with pytest.raises(PassphraseWrong, match="does not open"):
        load_vendor_key(path, lambda _: b"wrong")
    with pytest.raises(PassphraseWrong, match="protected by a passphrase"):
        load_vendor_key(path)
    with pytest.raises(PassphraseWrong, match="empty"):
        write_key(tmp_path / "w.key", VENDOR, b"")


def test_a_passphrase_file_is_a_secret_file_and_its_first_line_counts(tmp_path: Path) -> None:
    path = tmp_path / "pass"
    path.write_bytes(b"hello\r\nworld\n")
    path.chmod(0o600)
    assert read_passphrase_file(path) == b"hello"
    path.chmod(0o644)
    with pytest.raises(KeyPermissions):
        read_passphrase_file(path)


def changed(change: dict[str, Any]) -> bytes:
    file = json.loads(encode_key("device", DEVICE.secret, b"pw", MIN_SCRYPT_LOG2_N))
    for name, value in change.items():
        if name in ("log2_n", "r", "salt", "name"):
            file["kdf"][name] = value
        else:
            file[name] = value
    return json.dumps(file).encode()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", KeyProblem),
        (b"[" * 16000, KeyProblem),
        (b'{"format":' * 1000, KeyProblem),
        (changed({"format": "other"}), KeyProblem),
        (changed({"version": 2}), KeyProblem),
        (changed({"kind": "vendor"}), KeyProblem),
        (changed({"extra": 1}), KeyProblem),
        (changed({"log2_n": 40}), KeyProblem),
        (changed({"log2_n": 1}), KeyProblem),
        (changed({"log2_n": -1}), KeyProblem),
        (changed({"r": 1 << 20}), KeyProblem),
        (changed({"salt": "AAAA"}), KeyProblem),
        (changed({"name": "none"}), KeyProblem),
        (changed({"key": ""}), PassphraseWrong),
        (changed({"key": "AAAA"}), PassphraseWrong),
        (changed({"key": "not base64!"}), KeyProblem),
        (changed({"log2_n": MIN_SCRYPT_LOG2_N + 1}), PassphraseWrong),
        (changed({"kdf": None}), KeyProblem),
        (encode_key("device", b"short", None, 0), KeyProblem),
        (VENDOR.public.pem, KeyProblem),
    ],
)
def test_a_broken_key_file_is_told_cheaply(data: bytes, error: type[FlexServeError]) -> None:
    with pytest.raises(error):
        decode_key(data, "device", "k", lambda _: b"pw")


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, crypto.CURVE_ORDER.to_bytes(32, "big")])
def test_a_scalar_outside_the_curves_order_is_no_key(tmp_path: Path, secret: bytes) -> None:
    path = tmp_path / "device.key"
    path.write_bytes(encode_key("device", secret, None, 0))
    path.chmod(0o600)
    with pytest.raises(KeyProblem, match="P-256"):
        load_device_key(path)


def test_odd_files_are_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(KeyProblem, match="not a regular file"):
        load_device_key(tmp_path / "pipe")
    with pytest.raises(KeyProblem, match="not a regular file"):
        load_device_key("/dev/null")
    with pytest.raises(NotFound):
        load_device_key(tmp_path / "none")
    (tmp_path / "big").write_bytes(b"x" * (17 << 10))
    (tmp_path / "big").chmod(0o600)
    with pytest.raises(KeyProblem, match="larger"):
        load_device_key(tmp_path / "big")


def test_a_systemd_credential_is_read_by_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(KeyProblem, match="no systemd credentials"):
        load_device_key("credential:device")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    path = write_key(tmp_path / "device", DEVICE).secret
    path.chmod(0o440)  # how systemd's access list shows
    assert load_device_key("credential:device").key_id == DEVICE.key_id
    for name in ("", ".", "..", "../device", "/device"):
        with pytest.raises(KeyProblem, match="not the name"):
            load_device_key(f"credential:{name}")
    path.chmod(0o444)
    with pytest.raises(KeyPermissions):
        load_device_key("credential:device")


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        ec.generate_private_key(ec.SECP384R1())
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        rsa.generate_private_key(65537, 1024)
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        encode_key("device", DEVICE.secret, None, 0),
    ],
)
def test_only_p256_in_pem_is_a_public_key(pem: bytes) -> None:
    for cls in (VendorPublicKey, DevicePublicKey):
        with pytest.raises(KeyProblem, match=r"some\.pub"):
            cls.from_pem(pem, "some.pub")


def test_the_trust_store_remembers_and_forgets(tmp_path: Path) -> None:
    store = TrustStore(tmp_path / "cfg" / "trusted")
    assert store.vendors() == ()
    other = VendorKey.generate().public
    for key in (VENDOR.public, other, VENDOR.public):
        store.trust(key)
    assert set(store.vendors()) == {VENDOR.public, other}
    assert store.distrust(other.key_id.hex()[:10]) == other.key_id.hex()
    assert store.vendors() == (VENDOR.public,)
    with pytest.raises(NotFound):
        store.distrust(other.key_id.hex())
    for bad in ("", "abc", "../../../../etc", "zz" * 10):
        with pytest.raises(Usage):
            store.distrust(bad)


def test_a_trust_store_that_others_could_have_changed_is_refused(tmp_path: Path) -> None:
    store = TrustStore(tmp_path / "trusted")
    path = store.trust(VENDOR.public)
    for place, mode in ((path, 0o666), (store.directory, 0o777)):
        before = stat.S_IMODE(place.stat().st_mode)
        place.chmod(mode)
        with pytest.raises(KeyPermissions, match="can be changed by others"):
            store.vendors()
        place.chmod(before)
    path.rename(path.with_name("0" * 64 + ".pub"))
    with pytest.raises(KeyPermissions, match="not the one it is named after"):
        store.vendors()
