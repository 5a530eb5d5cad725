"""The filters on an arm64 kernel: Debian's, in a machine that QEMU emulates. Its first and only program installs each
filter in processes, which make the calls that the filter refuses, and some that it allows."""

from __future__ import annotations

import errno
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from flexserve.errors import NotFound
from flexserve.worlds.linux.seccomp import ALLOW, KILL, MACHINES, NUMBERS, WHOLE
from flexserve.worlds.trustzone.linux import Debian, archive, find

from .test_filters import CONFINED, NAMES, PID, expected, made, number

COMPILER, QEMU = "aarch64-linux-gnu-gcc", "qemu-system-aarch64"
MACHINE = "aarch64"


@cache
def debian() -> Debian | None:
    try:
        return find()
    except NotFound:
        return None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which(COMPILER) is None or shutil.which(QEMU) is None or debian() is None,
        reason=f"needs {COMPILER}, {QEMU} and Debian's arm64 kernel: `make tz-linux` gets them",
    ),
]

PROGRAM = r"""
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

struct installed { unsigned short length; const void *code; };
struct call { int filter; long number; unsigned long a[6]; };
@DATA@

int main(void) {
    mkdir("/dev", 0755);
    mount("dev", "/dev", "devtmpfs", 0, "");
    int console = open("/dev/ttyAMA0", O_RDWR);
    dup2(console, 1);
    setvbuf(stdout, 0, _IOLBF, 0);
    for (unsigned long i = 0; i < sizeof calls / sizeof *calls; i++) {
        pid_t pid = fork();
        if (pid == 0) {
            prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            if (syscall(SYS_seccomp, 1, 0, &filters[calls[i].filter]) != 0) _exit(200);
            const unsigned long *a = calls[i].a;
            errno = 0;
            long done = syscall(calls[i].number, a[0], a[1], a[2], a[3], a[4], a[5]);
            _exit(done == -1 ? errno : 0);
        }
        int status = 0;
        waitpid(pid, &status, 0);
        printf("result %lu %d\n", i, WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status));
    }
    printf("that is all\n");
    sync();
    reboot(RB_POWER_OFF);
}
"""


@dataclass(frozen=True)
class Call:
    """A system call behind a filter, and what is expected of it."""

    name: str
    filter: str
    number: int
    arguments: tuple[int, ...]
    action: int


ZEROS, ONES, HIGH = (0,) * 6, (WHOLE,) * 6, (1 << 32,) * 6
# Allowed, and harmless: they fail for other reasons, or do nothing.
HARMLESS: dict[str, tuple[int, ...]] = {
    "getpid": ZEROS, "sched_yield": ZEROS, "lseek": (WHOLE, 0, 0), "mmap": (0, 4096, 3, 0x22, WHOLE, 0),
    "mprotect": ZEROS, "fcntl": (WHOLE, 1, 0), "ioctl": (WHOLE, 0x541B, 0), "prctl": (15, 0, 0),
    "newfstatat": (WHOLE, 0, 0, 0x1000), "prlimit64": (0, 4, 0, 0),
}  # fmt: skip
ALLOWED_TO: dict[str, dict[str, tuple[int, ...]]] = {
    "secure": {
        "clone": (0x10000, 0, 0, 0, 0), "socketpair": (1, 5, 0, 0), "tgkill": (PID, PID, 0), "preadv2": (WHOLE,),
        "epoll_pwait": (WHOLE,), "fallocate": (WHOLE,), "mincore": (1,), "sync_file_range": (WHOLE,), "mlock2": ZEROS,
    },
    "zygote": {"kill": (PID, 0), "wait4": (WHOLE, 0, 0, 0), "seccomp": (1, 5, 0), "socketpair": (1, 1, 0, 0)},
    "template": {"tgkill": (PID, PID, 0)},
}  # fmt: skip


def calls() -> list[Call]:
    arch, found = MACHINES[MACHINE].audit_arch, []
    for name in NAMES:
        for call in NUMBERS:
            asked = number(call, MACHINE)
            for arguments in {ZEROS, ONES, HIGH}:
                if asked is not None:
                    action = made(name, MACHINE).decide(arch, asked, arguments)
                    if action != ALLOW:
                        found.append(Call(call, name, asked, arguments, action))
        nowhere = (0x40000000 | 172, 0x7FFFFFFF, 0xFFFFFFFF)
        found += [Call("none", name, asked, ZEROS, KILL) for asked in nowhere]
    for name in CONFINED:
        for call, some in {**HARMLESS, **ALLOWED_TO[name]}.items():
            action = expected(name, (*some, *ZEROS)[:6]).get(call, ALLOW)
            asked = number(call, MACHINE)
            assert action == ALLOW and asked is not None, call
            found.append(Call(call, name, asked, some, action))
    return found


def source(asked: list[Call]) -> str:
    filters = []
    out = []
    for at, name in enumerate(NAMES):
        instructions = made(name, MACHINE).instructions
        rows = ", ".join(f"{{{code}, {true}, {false}, {k:#x}u}}" for code, true, false, k in instructions)
        out.append(f"static const struct sock_filter code{at}[] = {{{rows}}};")
        filters.append(f"{{{len(instructions)}, code{at}}}")
    rows = ",\n".join(
        f"{{{NAMES.index(c.filter)}, {c.number:#x}, {{{', '.join(f'{a:#x}ul' for a in c.arguments)}}}}}"
        for c in asked
    )
    out += [f"static const struct installed filters[] = {{{', '.join(filters)}}};"]
    out += [f"static const struct call calls[] = {{{rows}}};"]
    return PROGRAM.replace("@DATA@", "\n".join(out))


def run_on_arm64(directory: Path, text: str) -> str:
    """What the program prints on an arm64 kernel that has nothing else."""
    kernel = debian()
    assert kernel is not None
    (directory / "init.c").write_text(text)
    build: list[str | Path] = [
        COMPILER,
        "-O1",
        "-static",
        "-Wall",
        "-Werror",
        "-o",
        directory / "init",
        directory / "init.c",
    ]
    subprocess.run(build, check=True, timeout=120)
    (directory / "files").write_bytes(archive({"init": (0o100755, (directory / "init").read_bytes())}))
    done = subprocess.run(
        [
            QEMU, "-M", "virt", "-cpu", "cortex-a57", "-m", "512M", "-nographic", "-nodefaults", "-serial", "stdio",
            "-no-reboot", "-kernel", kernel.kernel, "-initrd", directory / "files",
            "-append", "console=ttyAMA0 quiet panic=-1",
        ],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return done.stdout


def test_an_arm64_kernel_decides_as_the_filters_were_meant(tmp_path: Path) -> None:
    asked = calls()
    assert len(asked) > 1000
    printed = run_on_arm64(tmp_path, source(asked))
    assert "that is all" in printed, printed[-2000:]
    lines = [line.split() for line in printed.splitlines() if line.startswith("result ")]
    results = {int(index): int(result) for _, index, result in lines}
    assert sorted(results) == list(range(len(asked)))
    for at, call in enumerate(asked):
        if call.action == KILL:
            assert results[at] == -31, call  # SIGSYS
        elif call.action == ALLOW:
            assert results[at] not in (errno.EPERM, errno.EACCES, errno.ENOSYS, 200), call
            assert results[at] >= 0, call
        else:
            assert results[at] == call.action & 0xFFFF, call
