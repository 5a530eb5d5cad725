"""The kernel's own tables of system calls, of both architectures: what its installed headers say."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess

import pytest

# arch/arm64/include/uapi/asm/unistd.h is these, and the generic table.
_AARCH64 = """
#define __ARCH_WANT_RENAMEAT
#define __ARCH_WANT_NEW_STAT
#define __ARCH_WANT_SET_GET_RLIMIT
#define __ARCH_WANT_TIME32_SYSCALLS
#define __ARCH_WANT_SYS_CLONE3
#define __ARCH_WANT_MEMFD_SECRET
#include <asm-generic/unistd.h>
"""
_HEADERS = {"x86_64": "#include <asm/unistd_64.h>\n", "aarch64": _AARCH64}


@functools.cache
def kernel_table(machine: str) -> dict[str, int]:
    """Name to number of every system call. Skips the test where the headers are not installed."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler that reads the kernel's headers")
    done = subprocess.run(
        [compiler, "-E", "-dM", "-"], input=_HEADERS[machine], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"the kernel's headers for {machine} are not installed (Debian: linux-libc-dev)")
    defined = dict(re.findall(r"#define (__NR\w*) (\w+)", done.stdout))
    table = {}
    for name in defined:
        value = name
        while value in defined:
            value = defined[value]
        if name.startswith("__NR_") and value.isdigit():
            table[name.removeprefix("__NR_")] = int(value)
    table.pop("syscalls", None)  # how many there are
    assert len(table) > 250
    return table
