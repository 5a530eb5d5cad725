"""`flexserve serve` with and without its memory manager: real processes, over the fake world."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexserve.normal import pressure
from flexserve.worlds.fake import write_fake_model

PROGRAM = [sys.executable, "-c", "from flexserve.cli import main; main()"]


def open_files(pid: int) -> set[str]:
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(str(fd.readlink()))
        except FileNotFoundError:  # closed meanwhile
            continue
    return found


@pytest.mark.skipif(not pressure.PSI_PATH.exists(), reason="this kernel has no pressure stall information")
@pytest.mark.parametrize("option", ["", "--memory-manager", "--no-memory-manager"])
def test_a_server_watches_memory_unless_told_not_to_and_stops_cleanly(tmp_path: Path, option: str) -> None:
    write_fake_model(tmp_path, "demo")
    (tmp_path / "p").mkdir(mode=0o700)
    words = ["serve", "--world", "fake", "--port", "0", "--model", "demo=demo.flex", *option.split()]
    process = subprocess.Popen(
        [*PROGRAM, *words],
        cwd=tmp_path,
        env={**os.environ, "FLEXSERVE_ADMIN_SOCKET": str(tmp_path / "p" / "a.sock")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("FlexServe is ready at ")
        watches = str(pressure.PSI_PATH) in open_files(process.pid)
        assert watches == (option != "--no-memory-manager")
        process.terminate()
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "")
    assert "error" not in err
    assert "memory manager: the world is closed" not in err
