"""Users and capabilities: who a process is, and how it becomes somebody with nothing.

Knows Linux's calls and which user numbers are free; does not know who needs which.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import random
from pathlib import Path

from ...errors import EngineFailure

DYNAMIC_USERS = range(61184, 65520)  # the numbers systemd gives to services without a user of their own
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


def drop_bounding_set() -> None:
    """Nothing this process starts can gain a capability. Does what it may: ordinary users have none to drop."""
    capability = 0
    while _libc.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
        capability += 1


def drop_capabilities() -> None:
    """Give every capability of this thread away. Raises `EngineFailure`."""
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise EngineFailure(f"cannot drop capabilities: {os.strerror(ctypes.get_errno())}")
