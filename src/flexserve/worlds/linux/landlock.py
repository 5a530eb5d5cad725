"""Landlock: no file, no TCP connection and no signal to others, on top of what seccomp refuses.

Knows the kernel's versions of it (Documentation/userspace-api/landlock.rst). The ruleset has no rule: everything
it handles is refused. Descriptors that are open stay usable, and so does the memory behind them.
"""

from __future__ import annotations

import ctypes
import os
import struct

from ...errors import EngineFailure

_CREATE_RULESET, _RESTRICT_SELF = 444, 446  # on every architecture
_VERSION = 1
_PR_SET_NO_NEW_PRIVS = 38
_libc = ctypes.CDLL(None, use_errno=True)

# (first version, bits): what each version of the kernel's interface added.
_FILES = ((1, 0x1FFF), (2, 0x2000), (3, 0x4000), (5, 0x8000))  # REFER, TRUNCATE, IOCTL_DEV
_NETWORK = ((4, 0x3),)  # bind and connect of TCP
_SCOPES = ((6, 0x3),)  # abstract unix sockets and signals of processes outside


def version() -> int:
    """The kernel's version of the interface; 0 where it has none, or it is switched off at boot."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, 0, _VERSION)))


def ruleset(known: int) -> bytes:
    """`struct landlock_ruleset_attr` that handles all a kernel of this version can."""

    def bits(added: tuple[tuple[int, int], ...]) -> int:
        return sum(bits for since, bits in added if since <= known)

    fields = [bits(_FILES)]
    if known >= 4:
        fields.append(bits(_NETWORK))
    if known >= 6:
        fields.append(bits(_SCOPES))
    return struct.pack(f"<{len(fields)}Q", *fields)


def restrict(known: int) -> None:
    """Refuse everything to this thread and to all it starts; there is no way back.

    Raises `EngineFailure` when the kernel refuses.
    """
    data = ruleset(known)
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    fd = _libc.syscall(_CREATE_RULESET, data, ctypes.c_size_t(len(data)), 0)
    if fd < 0:
        raise EngineFailure(f"cannot harden the secure world: Landlock: {os.strerror(ctypes.get_errno())}")
    try:
        if _libc.syscall(_RESTRICT_SELF, fd, 0) != 0:
            reason = os.strerror(ctypes.get_errno())
            raise EngineFailure(f"cannot harden the secure world: Landlock: {reason}")
    finally:
        os.close(fd)
