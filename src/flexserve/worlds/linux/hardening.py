"""What the secure process does to itself before it reads any secret (docs/threat-model.md, "linux").

Knows Linux's calls. Every measure works for an unprivileged process; which attacker each one stops is said
there, not here.
"""

from __future__ import annotations

import ctypes
import os
import resource

from ...errors import EngineFailure

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int, what: str) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise EngineFailure(f"cannot harden the secure world: {what}: {os.strerror(ctypes.get_errno())}")


def harden() -> None:
    """Not dumpable (no core, no ptrace and no /proc/PID/mem by the same user without privilege), no core
    limit, no new privileges, a private umask. Raises `EngineFailure` when the kernel refuses one."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0, "PR_SET_DUMPABLE")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")
    os.umask(0o077)


def close_other_descriptors(keep: int) -> None:
    """Close everything but the standard three and one more."""
    os.closerange(3, keep)
    os.closerange(keep + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def clean_environment() -> None:
    """Forget the environment but for what systemd's credentials need."""
    kept = {k: v for k in ("CREDENTIALS_DIRECTORY", "GGML_NO_BACKTRACE") if (v := os.environ.get(k))}
    os.environ.clear()
    os.environ.update(kept)
