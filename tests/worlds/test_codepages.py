"""Pages that libffi made writable and executable: once sealed they are not, and functions in them still work."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexserve.errors import EngineFailure
from flexserve.worlds.linux import codepages, seccomp
from flexserve.worlds.linux.codepages import Mapping, mappings, seal_code, twice_mapped
from flexserve.worlds.linux.seccomp import ALLOW, Check, Rule, program

ANSWER = ctypes.CFUNCTYPE(ctypes.c_int)
# As systemd's MemoryDenyWriteExecute and SELinux: then libffi maps a memory file twice.
NEVER_BOTH = program(
    [Rule("mmap", checks=(Check(2, 6, (0, 2, 4)),)), Rule("mprotect", checks=(Check(2, 4, (0,)),))], ALLOW
)


def exposed() -> list[Mapping]:
    """Pages of code that can be written, also under another address."""
    found = mappings(Path("/proc/self/maps").read_text())
    twice = twice_mapped(found)
    return [m for m in found if "w" in m.permissions and ("x" in m.permissions or m.file in twice)]


def descriptors_of_code() -> list[int]:
    twice = twice_mapped(mappings(Path("/proc/self/maps").read_text()))
    fds = [fd for fd in range(3, 1024) if Path(f"/proc/self/fd/{fd}").exists()]
    return [fd for fd in fds if (os.fstat(fd).st_dev, os.fstat(fd).st_ino) in twice]


def make_and_seal(refused: bool) -> None:
    if refused:
        seccomp.install(NEVER_BOTH)
    made = [ANSWER(lambda n=n: n) for n in range(100)]
    assert exposed(), "the control"
    seal_code()
    assert not exposed()
    assert not descriptors_of_code()
    assert [function() for function in made] == list(range(100))
    os._exit(0)  # to free them takes writing, and the secure process ends so too


@pytest.mark.parametrize("refused", [False, True])
def test_functions_that_c_calls_still_work_and_their_pages_cannot_be_written(refused: bool) -> None:
    # In a process of its own: this one's libffi may have made pages for other tests, before anything was refused.
    subprocess.run([sys.executable, __file__, *["refused"] * refused], check=True, timeout=60)


def test_a_page_that_cannot_be_sealed_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "1000-2000 rwxp 00000000 00:00 0 \n"
    monkeypatch.setattr(codepages, "mappings", lambda _: mappings(text))
    with pytest.raises(EngineFailure, match="a page of code stays writable: Cannot allocate memory"):
        seal_code()


def test_maps_are_read_as_the_kernel_writes_them() -> None:
    text = (
        "00400000-00452000 r-xp 00000000 08:02 173521      /usr/bin/dbus-daemon\n"
        "7f0000000000-7f0000001000 rw-s 00000000 00:01 42 /memfd:libffi (deleted)\n"
        "7f0000002000-7f0000003000 r-xs 00000000 00:01 42 /memfd:libffi (deleted)\n"
        "7ffe00000000-7ffe00001000 rw-p 00000000 00:00 0 [stack]\n"
    )
    found = mappings(text)
    assert [m.permissions for m in found] == ["r-xp", "rw-s", "r-xs", "rw-p"]
    assert found[0] == Mapping(0x400000, 0x452000, "r-xp", (os.makedev(8, 2), 173521))
    assert found[3].file is None
    assert twice_mapped(found) == {(os.makedev(0, 1), 42)}


if __name__ == "__main__":
    make_and_seal("refused" in sys.argv)
