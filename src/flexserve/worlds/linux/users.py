"""Users and capabilities: who a process is, and how it becomes somebody with nothing.

Knows Linux's calls and which user numbers are free; does not know who needs which.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from ...errors import EngineFailure, Usage

DYNAMIC_USERS = range(61184, 65520)  # the numbers systemd gives to services without a user of their own
DEFAULT_GATEWAY = "flexserve"
CAP_SETGID, CAP_SETUID = 6, 7
_CAPABILITY_VERSION_3 = 0x20080522
_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_libc = ctypes.CDLL(None, use_errno=True)


def may_change_user() -> bool:
    """Whether this process may become another user: it is root, and was not stripped of that power."""
    effective = int(status("self").get("CapEff", "0"), 16)
    return os.geteuid() == 0 and bool(effective >> CAP_SETUID & 1) and bool(effective >> CAP_SETGID & 1)


def status(pid: int | str) -> dict[str, str]:
    """/proc/PID/status. Raises `OSError`."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def free_user() -> int:
    """A user number that no account and no process has."""
    used: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                used.update(int(uid) for uid in status(entry.name)["Uid"].split())
            except (OSError, KeyError):
                continue  # it ended meanwhile
    free = [uid for uid in DYNAMIC_USERS if uid not in used]
    for uid in random.SystemRandom().sample(free, len(free)):
        try:
            pwd.getpwuid(uid)
        except KeyError:
            return uid
    raise EngineFailure("every user number for services is taken")


@dataclass(frozen=True)
class Account:
    """A user a process can become."""

    uid: int
    gid: int
    name: str


def gateway_account(name: str | None) -> Account:
    """Who the gateway is to be when it was started as root: the user of that name; without one `flexserve` where there
    is such an account, else a number nobody has. Raises `Usage` for a name nobody has, or root's."""
    try:
        entry = pwd.getpwnam(name or DEFAULT_GATEWAY)
    except KeyError:
        if name is not None:
            hint = f"make it with `useradd --system {name}`"
            raise Usage(f"there is no user {name!r} on this machine", hint=hint) from None
        uid = free_user()
        return Account(uid, uid, str(uid))
    if entry.pw_uid == 0:
        raise Usage(f"user {entry.pw_name} is root, which the gateway must not stay")
    return Account(entry.pw_uid, entry.pw_gid, entry.pw_name)


def become(uid: int, gid: int) -> None:
    """Be this user for good: no other group, no capability. Raises `EngineFailure`."""
    try:
        drop_bounding_set()
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise EngineFailure(f"cannot become user {uid}: {error.strerror}") from error
    drop_capabilities()


def drop_bounding_set(kept: Collection[int] = ()) -> None:
    """Nothing this process starts can gain another capability. Does what it may: ordinary users have none."""
    capability = 0
    while _libc.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        if capability not in kept:
            _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
        capability += 1


def drop_capabilities(kept: Collection[int] = ()) -> None:
    """Give every other capability of this thread away. Raises `EngineFailure`."""
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    # Those it has, as far as they are to be kept: asking for more is an error.
    mask = sum(1 << c for c in kept) & int(status("thread-self")["CapPrm"], 16)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)) != 0:
        raise EngineFailure(f"cannot drop capabilities: {os.strerror(ctypes.get_errno())}")


def closed_to(paths: Iterable[Path], uid: int) -> Path | None:
    """The first directory above these, or one of these, that this user may not enter or read; None: all are open."""
    for path in paths:
        for part in (*reversed(path.resolve().parents), path.resolve()):
            info = part.stat()
            wanted = 0o5 if part.is_dir() and part == path.resolve() else 0o1 if part.is_dir() else 0o4
            bits = info.st_mode >> 6 if info.st_uid == uid else info.st_mode
            if bits & wanted != wanted:
                return part
    return None
