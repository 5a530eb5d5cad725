"""Builds the firmware's portable C for this machine, with sanitizers: a shared library and the explorer."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

FIRMWARE = Path(__file__).parents[2] / "firmware"
PAGES = 1024  # two blocks
FLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all"]
MONITOR = ("el2/pages.c", "el2/stage2.c", "host/machine.c", "host/invariants.c")
CALLS = (*MONITOR, "el2/calls.c", "el2/session.c", "sel1/flexmem.c", "host/library.c")


def build(out: Path, sources: Sequence[str], *flags: str) -> Path:
    """Compile `sources` of firmware/ to `out`."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: install gcc to test the monitor's C code")
    include = [f"-I{FIRMWARE / 'include'}", f"-I{FIRMWARE / 'el2'}", f"-DDRAM_PAGES={PAGES}"]
    files = [str(FIRMWARE / source) for source in sources]
    subprocess.run([compiler, *FLAGS, *flags, *include, *files, "-o", str(out)], check=True)
    return out


class HostMonitor:
    """The C monitor with its trusted OS list. One per process: its state is global."""

    def __init__(self, library: Path) -> None:
        self._c = ctypes.CDLL(str(library))
        self._c.host_wrong.restype = ctypes.c_char_p
        self._c.host_state.restype = ctypes.c_int64
        self._c.host_write.restype = ctypes.c_bool
        self._result = (ctypes.c_uint64 * 4)()
        self._value = ctypes.c_uint64()
        self.reset()

    def reset(self) -> None:
        self._c.host_reset()

    def call(self, call: int, *args: int, cpu: int = 0) -> tuple[int, int, int, int]:
        """x0 (signed) to x3."""
        full = (ctypes.c_uint64 * 4)(*args)
        self._c.host_call(cpu, ctypes.c_uint32(call), full, self._result)
        x0, x1, x2, x3 = self._result
        return x0 - (1 << 64) if x0 >> 63 else x0, x1, x2, x3

    def interrupt_in(self, calls: int) -> None:
        """Let an interrupt come before the trusted OS's so manieth call; 0: never."""
        self._c.host_interrupt_in(ctypes.c_uint64(calls))

    def write(self, address: int, value: int) -> bool:
        return bool(self._c.host_write(ctypes.c_uint64(address), ctypes.c_uint64(value)))

    def read(self, address: int, cpu: int = 0) -> tuple[int, int]:
        """(0 a value, 1 a fault, 2 a fault to try again after; the value)."""
        how = self._c.host_read(cpu, ctypes.c_uint64(address), ctypes.byref(self._value))
        return how, self._value.value

    def state(self, address: int) -> int:
        return int(self._c.host_state(ctypes.c_uint64(address)))

    def wrong(self) -> str | None:
        """What invariant does not hold."""
        found = self._c.host_wrong()
        return None if found is None else found.decode()
