"""Key files and key sources (docs/sealed-format.md, "Key files").

Knows the container, its passphrase protection and which permissions a secret file must have. Does not know
what keys do (keys.py), and never writes a secret anywhere but into a new file of mode 0600.
"""

from __future__ import annotations

import base64
import os
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from ..errors import KeyPermissions, KeyProblem, NotFound, PassphraseWrong, StorageFailure, Usage
from .keys import DeviceKey, VendorKey
from .secret import wipe

MAX_KEY_FILE_BYTES = 16 << 10
SCRYPT_LOG2_N = 17  # 128 MiB, about 0.3 s
MIN_SCRYPT_LOG2_N, MAX_SCRYPT_LOG2_N = 14, 20

K = TypeVar("K", VendorKey, DeviceKey)
Kind = Literal["vendor", "device"]
Passphrase = Callable[[str], bytes]  # asked for the file of that name, only when it is needed
_NO_OVERWRITE = "a key is never overwritten: choose another name"
_SECRET_BYTES: dict[Kind, int] = {"vendor": 64, "device": 32}


class _Kdf(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Literal["scrypt"]
    log2_n: int
    r: Literal[8]
    p: Literal[1]
    salt: bytes


class _KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: Literal["flexserve-key"]
    version: Literal[1]
    kind: Kind
    kdf: _Kdf | None
    key: bytes


@dataclass(frozen=True)
class KeyFiles:
    """Where `write_key` put the two halves."""

    secret: Path
    public: Path


def write_key(
    path: Path,
    key: VendorKey | DeviceKey,
    passphrase: bytes | None = None,
    *,
    log2_n: int = SCRYPT_LOG2_N,
) -> KeyFiles:
    """Write a new secret key file of mode 0600 and its public key beside it.

    Overwrites nothing. Raises `Usage` when either file exists, `StorageFailure`.
    """
    public = path.with_suffix(".pub") if path.suffix == ".key" else path.with_name(path.name + ".pub")
    for file in (path, public):
        if file.exists() or file.is_symlink():
            raise Usage(f"{file} exists already", hint=_NO_OVERWRITE)
    kind: Kind = "vendor" if isinstance(key, VendorKey) else "device"
    _create(path, encode_key(kind, key.secret, passphrase, log2_n), 0o600)
    try:
        _create(public, key.public.pem, 0o644)
    except BaseException:
        path.unlink()
        raise
    return KeyFiles(path, public)


def encode_key(kind: Kind, secret: bytes, passphrase: bytes | None, log2_n: int) -> bytes:
    """The content of a secret key file."""
    kdf = None
    if passphrase is not None:
        if not passphrase:
            raise PassphraseWrong("the passphrase is empty")
        kdf = _Kdf("scrypt", log2_n, 8, 1, secrets.token_bytes(16))
        nonce = secrets.token_bytes(12)
        secret = nonce + _protection(passphrase, kdf).encrypt(nonce, secret, _aad(kind, kdf))
    file = _KeyFile("flexserve-key", 1, kind, kdf, secret)
    return msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n"


def load_vendor_key(source: str | Path, passphrase: Passphrase | None = None) -> VendorKey:
    """Read a vendor's secret key. Raises `NotFound`, `KeyProblem`, `KeyPermissions`, `PassphraseWrong`."""
    return _key(VendorKey.from_secret, *_load(str(source), "vendor", passphrase))


def load_device_key(source: str | Path, passphrase: Passphrase | None = None) -> DeviceKey:
    """Read a device's secret key; errors as `load_vendor_key`.

    `source` is a path, or `credential:NAME` for a systemd credential of this service.
    """
    return _key(DeviceKey.from_secret, *_load(str(source), "device", passphrase))


def decode_key(data: bytes, kind: Kind, source: str, passphrase: Passphrase | None = None) -> bytes:
    """The secret in a key file's content. Raises `KeyProblem`, `PassphraseWrong`."""
    try:
        file = msgspec.json.decode(data, type=_KeyFile)
    except (msgspec.DecodeError, RecursionError) as error:
        raise KeyProblem(f"{source} is not a FlexServe key file: {error}") from None
    if file.kind != kind:
        raise KeyProblem(
            f"{source} is a {file.kind} key; a {kind} key is needed here",
            hint=f"`flexserve keys {kind}` makes one",
        )
    if file.kdf is None:
        secret = file.key
    else:
        if not MIN_SCRYPT_LOG2_N <= file.kdf.log2_n <= MAX_SCRYPT_LOG2_N or len(file.kdf.salt) != 16:
            raise KeyProblem(f"{source} has scrypt parameters outside the limits")
        if passphrase is None:
            raise PassphraseWrong(f"{source} is protected by a passphrase", hint="give --passphrase-file")
        protection = _protection(passphrase(source), file.kdf)
        try:
            secret = protection.decrypt(file.key[:12], file.key[12:], _aad(kind, file.kdf))
        except (InvalidTag, ValueError):
            raise PassphraseWrong(f"the passphrase does not open {source}") from None
    if len(secret) != _SECRET_BYTES[kind]:
        raise KeyProblem(f"{source} holds a secret of {len(secret)} bytes")
    return secret


def read_passphrase_file(path: Path) -> bytes:
    """The first line of a file that only its owner can read. Raises as `load_vendor_key`."""
    secret = _read_secret(path, credential=False, what="passphrase file")
    return secret.split(b"\n", 1)[0].removesuffix(b"\r")


def _key(make: Callable[[bytes], K], secret: bytes, source: str) -> K:
    try:
        return make(secret)
    except ValueError:
        raise KeyProblem(f"{source} does not hold P-256 keys") from None
    finally:
        wipe(secret)


def check_key_file(source: str, kind: Kind = "device") -> None:
    """Refuse a secret key file that cannot be used, without looking into one that only its owner can reach.

    Raises as `load_device_key`.
    """
    path, credential = _place(source)
    others = 0o037 if credential else 0o077
    if not path.is_file() or path.stat().st_mode & others or not os.access(path, os.R_OK):
        wipe(
            _read_secret(path, credential=credential, what="key file", hint=_how_made(path, kind, credential))
        )


def _load(source: str, kind: Kind, passphrase: Passphrase | None) -> tuple[bytes, str]:
    path, credential = _place(source)
    data = _read_secret(path, credential=credential, what="key file", hint=_how_made(path, kind, credential))
    try:
        return decode_key(data, kind, source, passphrase), source
    finally:
        wipe(data)


def _place(source: str) -> tuple[Path, bool]:
    """Where the key is, and whether that is a systemd credential."""
    credential = source.startswith("credential:")
    return (_credential(source.removeprefix("credential:")) if credential else Path(source)), credential


def _how_made(path: Path, kind: Kind, credential: bool) -> str:
    return "" if credential else f"`flexserve keys {kind} -o {path}` makes one"


def _credential(name: str) -> Path:
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise KeyProblem(
            "there are no systemd credentials: CREDENTIALS_DIRECTORY is not set",
            hint="`credential:` works in a service with LoadCredential= or LoadCredentialEncrypted=",
        )
    if not name or "/" in name or name in (".", ".."):
        raise KeyProblem(f"{name!r} is not the name of a systemd credential")
    return Path(directory) / name


def _read_secret(path: Path, *, credential: bool, what: str, hint: str = "") -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"there is no {what} {path}", hint=hint) from None
    except PermissionError:
        raise KeyPermissions(f"you may not read {path}") from None
    except OSError as error:
        raise StorageFailure(f"cannot open {path}: {error.strerror}") from error
    with os.fdopen(fd, "rb", buffering=0) as file:  # no buffer of Python's, which nobody could wipe
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise KeyProblem(f"{path} is not a regular file")
        try:
            data = file.read(MAX_KEY_FILE_BYTES + 1)
        except OSError as error:
            raise StorageFailure(f"cannot read {path}: {error.strerror}") from error
    if b"BEGIN PUBLIC KEY" in data:  # before its mode: that of a public key is right, the file is wrong
        raise KeyProblem(f"{path} is a public key", hint="give the secret key, the .key file")
    check_secret_file(info, path, credential=credential)
    if len(data) > MAX_KEY_FILE_BYTES:
        raise KeyProblem(f"{path} is larger than a key file can be")
    return data


def check_secret_file(info: os.stat_result, path: Path, *, credential: bool) -> None:
    """Refuse a secret file that others can reach. Raises `KeyPermissions`.

    systemd hands a credential over as root's file with an access list for the service, which shows as
    group-readable: there, root as owner and the group's read bit are right.
    """
    mode = stat.S_IMODE(info.st_mode)
    if mode & (0o037 if credential else 0o077):
        raise KeyPermissions(f"{path} has mode {mode:04o}: others can reach it", hint=f"chmod 600 {path}")
    owners = (os.geteuid(), 0) if credential else (os.geteuid(),)
    if info.st_uid not in owners:
        raise KeyPermissions(
            f"{path} belongs to user {info.st_uid}, not to you ({os.geteuid()})",
            hint=f"run as that user, or chown {path}",
        )


def _create(path: Path, data: bytes, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, mode)
    except FileExistsError:
        raise Usage(
            f"{path} exists already", hint="a key is never overwritten: choose another name"
        ) from None
    except OSError as error:
        raise StorageFailure(f"cannot create {path}: {error.strerror}") from error
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
    except BaseException as error:
        path.unlink()
        if isinstance(error, OSError):
            raise StorageFailure(f"cannot write {path}: {error.strerror}") from error
        raise


def _protection(passphrase: bytes, kdf: _Kdf) -> AESGCM:
    return AESGCM(Scrypt(kdf.salt, 32, 1 << kdf.log2_n, kdf.r, kdf.p).derive(passphrase))


def _aad(kind: Kind, kdf: _Kdf) -> bytes:
    salt = base64.b64encode(kdf.salt).decode()
    return f"flexserve-key/1/{kind}/scrypt/{kdf.log2_n}/{kdf.r}/{kdf.p}/{salt}".encode()
