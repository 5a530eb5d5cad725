"""The device's trust store: a directory with one public key per trusted vendor.

Knows files and their permissions; what a trusted key is good for is decided by reader.py and licence.py.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from ..errors import KeyPermissions, NotFound, StorageFailure, Usage
from .files import xdg_directory
from .keys import VendorPublicKey

MAX_PUBLIC_KEY_BYTES = 4096
_FILE = re.compile(r"[0-9a-f]{64}\.pub")


def default_trust_dir() -> Path:
    """$XDG_CONFIG_HOME/flexserve/trusted, or below ~/.config."""
    return xdg_directory("XDG_CONFIG_HOME", ".config") / "trusted"


def read_public_key(path: Path) -> VendorPublicKey:
    """A vendor's `.pub` file. Raises `NotFound`, `KeyProblem`, `StorageFailure`."""
    return VendorPublicKey.from_pem(read_small(path), str(path))


def read_small(path: Path) -> bytes:
    """The content of a public key file. Raises `NotFound`, `StorageFailure`."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_PUBLIC_KEY_BYTES)
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}") from None
    except OSError as error:
        raise StorageFailure(f"cannot read {path}: {error.strerror}") from error


class TrustStore:
    """The vendors this device trusts."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = default_trust_dir() if directory is None else directory

    def vendors(self) -> tuple[VendorPublicKey, ...]:
        """Every trusted vendor, by id. Raises `KeyPermissions` when others could have added one."""
        try:
            paths = sorted(self.directory.iterdir())
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise StorageFailure(f"cannot read {self.directory}: {error.strerror}") from error
        self._check(self.directory)
        keys = []
        for path in paths:
            if not _FILE.fullmatch(path.name):
                continue  # an editor's backup, or a file being written
            self._check(path)
            key = read_public_key(path)
            if key.key_id.hex() != path.stem:
                raise KeyPermissions(
                    f"{path} holds key {key.key_id.hex()}, not the one it is named after",
                    hint="remove the file, then trust the vendor again",
                )
            keys.append(key)
        return tuple(keys)

    def trust(self, key: VendorPublicKey) -> Path:
        """Add a vendor; nothing happens if it is there. Raises `StorageFailure`, `KeyPermissions`."""
        path = self.directory / f"{key.key_id.hex()}.pub"
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check(self.directory)
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(key.pem)
            part.rename(path)
        except OSError as error:
            raise StorageFailure(f"cannot write {path}: {error.strerror}") from error
        return path

    def distrust(self, key_id: str) -> str:
        """Remove the vendor whose id begins with `key_id` (8 digits or more); returns the whole id.

        Raises `Usage`, `NotFound`.
        """
        if not re.fullmatch(r"[0-9a-f]{8,64}", key_id):
            raise Usage(f"{key_id!r} is not a vendor's id: at least 8 hexadecimal digits of it are needed")
        try:
            files = [p for p in self.directory.iterdir() if _FILE.fullmatch(p.name)]
        except FileNotFoundError:
            files = []
        found = [p for p in files if p.name.startswith(key_id)]
        if not found:
            raise NotFound(f"no trusted vendor has an id that begins with {key_id}")
        if len(found) > 1:
            raise Usage(f"{len(found)} trusted vendors have ids that begin with {key_id}: give more digits")
        try:
            found[0].unlink()
        except OSError as error:
            raise StorageFailure(f"cannot remove {found[0]}: {error.strerror}") from error
        return found[0].stem

    @staticmethod
    def _check(path: Path) -> None:
        info = path.stat()
        mode = stat.S_IMODE(info.st_mode)
        if info.st_uid not in (os.geteuid(), 0) or mode & 0o022:
            raise KeyPermissions(
                f"{path} can be changed by others (owner {info.st_uid}, mode {mode:04o})",
                hint=f"chmod go-w {path}, or let its owner be you or root",
            )
