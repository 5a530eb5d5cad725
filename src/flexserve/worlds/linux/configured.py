"""What a `Configure` message stands for: the device's key, whom the device trusts, and the Framework's settings.

Reads files, so everything here is called before the process is confined.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path

from ...core import Budget
from ...errors import PassphraseWrong
from ...framework.settings import Settings
from ...sealed.keyfile import load_device_key, read_passphrase_file
from ...sealed.keys import DeviceKey, VendorPublicKey
from ...sealed.trust import TrustStore, read_public_key
from .. import WorldOptions
from .channel import Configure


def device_key(configure: Configure) -> DeviceKey:
    def passphrase(source: str) -> bytes:
        if configure.passphrase_file is not None:
            return read_passphrase_file(Path(configure.passphrase_file))
        import getpass

        try:
            os.close(os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC))
            return getpass.getpass(
                f"passphrase of {source}: "
            ).encode()  # from the terminal, past the normal world
        except (OSError, EOFError):
            raise PassphraseWrong(
                f"{source} is protected by a passphrase, and there is no terminal to ask for it on",
                hint="give --passphrase-file",
            ) from None

    return load_device_key(configure.device_key, passphrase)


def usual_settings() -> Settings:
    """Without other wishes the secure world may have three quarters of the machine's memory: a normal world that
    watches memory takes back what is too much."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
    usual = Settings()
    return dataclasses.replace(
        usual, budget_bytes=memory, cap_bytes=memory, floor_bytes=min(usual.floor_bytes, memory)
    )


def limited(options: WorldOptions) -> Settings:
    """The usual settings with the limits that the options say. Raises `InvalidRequest`."""
    usual = usual_settings()
    wanted = options.limits(Budget(usual.budget_bytes, usual.cap_bytes, usual.floor_bytes, 0))
    return dataclasses.replace(
        usual, budget_bytes=wanted.soft_bytes, cap_bytes=wanted.hard_bytes, floor_bytes=wanted.floor_bytes
    )


def framework_settings(configure: Configure, *, on_demand: bool) -> Settings:
    """The Framework's."""
    settings = usual_settings() if configure.settings is None else configure.settings
    if configure.session_bytes is not None:
        settings = dataclasses.replace(settings, session_limit_bytes=configure.session_bytes)
    return dataclasses.replace(
        settings,
        saves=configure.saves,
        lazy=settings.lazy and configure.lazy and on_demand,
        prefetch=settings.prefetch and configure.prefetch,
        pinned=(*settings.pinned, *configure.pinned),
    )


def trusted_vendors(configure: Configure) -> Collection[VendorPublicKey]:
    if configure.vendor_pub is not None:
        return (read_public_key(Path(configure.vendor_pub)),)
    return TrustStore(Path(configure.trust_dir)).vendors()
