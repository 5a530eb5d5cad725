"""What the processes of the secure world do to themselves (docs/threat-model.md, "linux").

    launch.py        not dumpable, no core: the first instructions
    harden           the same again, nobody traces it, no new privileges, EARLY filter: before any library of ours
    confine          before the first byte of a model or a client: a user of its own, memory that is never swapped, no
                     page of code that can be written, Landlock, the SECURE filter
    confine_zygote   the same for the process that forks template processes; confine_template for those

Knows Linux's calls and their order. Every measure works for an unprivileged process, but for the user of its
own; which attacker each one stops is said in the threat model, not here.
"""

from __future__ import annotations

import ctypes
import os
import resource
import threading
from pathlib import Path

from ...errors import EngineFailure
from . import codepages, landlock, seccomp, syscalls, users
from .channel import Measures

# A compute thread per core, each staying where it is: they wait for each other hundreds of times per token, and a
# scheduler that puts two of them on one core (virtual machines that pack their processors) makes them 3 times slower.
# One that waits for another gives its processor to the loaders after about 0.3 ms: a page that is loaded takes
# milliseconds, a step of decoding tens of microseconds.
COMPUTE_THREADS = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores", "GOMP_SPINCOUNT": "20000"}
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int, what: str) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise EngineFailure(f"cannot harden the secure world: {what}: {os.strerror(ctypes.get_errno())}")


def harden() -> None:
    """Not dumpable (no core, no ptrace and no /proc/PID/mem by the same user without privilege), no core
    limit, no new privileges, a private umask, and the filter of what is never needed.

    Raises `EngineFailure` when the kernel refuses one, or when a debugger was faster.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0, "PR_SET_DUMPABLE")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")
    os.umask(0o077)
    tracer = users.status("self").get("TracerPid", "0")
    if tracer != "0":
        raise EngineFailure(
            f"process {tracer} traces the secure process, and would read what it decrypts",
            hint="start it without a debugger; root may attach later",
        )
    seccomp.install(syscalls.early())


def harden_gateway() -> None:
    """For the normal side, which sees its clients' prompts: no new privileges, and no core when it crashes.

    A limit of 1 byte and not 0, which means nothing to a crash reporter behind a pipe (core(5)).
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (min(1, hard) if hard >= 0 else 1, hard))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")


def close_other_descriptors(keep: int) -> None:
    """Close everything but the standard three and one more."""
    os.closerange(3, keep)
    os.closerange(keep + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def clean_environment() -> None:
    """Forget the environment but for what systemd's credentials need."""
    kept = {k: v for k in ("CREDENTIALS_DIRECTORY", "GGML_NO_BACKTRACE") if (v := os.environ.get(k))}
    os.environ.clear()
    os.environ.update(kept)
    # numpy computes nothing here, and Landlock holds for threads that are started after it.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ.update(COMPUTE_THREADS)


def confine(user: int | None) -> Measures:
    """The last step: call it when libraries are loaded and keys are read, while there is one thread.

    `user`: who to be from now on; None where the one who started it is all there is. Opens no file and starts no
    program afterwards. Raises `EngineFailure` when a measure that this kernel has is refused.
    """
    locked = _lock_memory()
    codepages.seal_code()
    if user is not None:
        users.become(user, user)
    else:
        users.drop_bounding_set()
        users.drop_capabilities()
    _prctl(_PR_SET_DUMPABLE, 0, "PR_SET_DUMPABLE")  # the kernel forgets it when the user changes
    version = landlock.version()
    if version:
        if threading.active_count() > 1 or len(list(Path("/proc/self/task").iterdir())) > 1:
            raise EngineFailure("cannot harden the secure world: a library has started a thread already")
        landlock.restrict(version)
    seccomp.install(syscalls.secure(os.getpid()))
    return Measures(landlock=version, file_refused=_file_refused(), memory_locked=locked)


def _lock_memory() -> bool:
    """Keep every page out of swap, each from when it is first used. False where the limit does not allow it."""
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, unlimited)
    except (ValueError, OSError):  # not root, and no unit that allows it
        return False
    return bool(_libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) == 0)


def _file_refused() -> bool:
    """Try it: that a measure was asked for does not prove that it works."""
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return True
    return False


def confine_nursery(user: int | None) -> None:
    """For the process that forks template zygotes, once all is loaded that they need."""
    if user is not None:
        users.become(user, user)
    else:
        users.drop_bounding_set()
        users.drop_capabilities()
    _prctl(_PR_SET_DUMPABLE, 0, "PR_SET_DUMPABLE")


def confine_zygote() -> None:
    """For a process that forks template processes."""
    version = landlock.version()
    if version:
        landlock.restrict(version)
    seccomp.install(syscalls.zygote())


def confine_template() -> None:
    """For a process that runs one template."""
    seccomp.install(syscalls.template(os.getpid()))
