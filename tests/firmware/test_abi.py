"""The interface is written once: the header, the Python enums and the document follow from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flexserve.monitor import abi

ROOT = Path(__file__).parents[2]
GENERATE = ROOT / "firmware" / "abi" / "generate.py"


def test_what_is_generated_is_what_the_description_says() -> None:
    done = subprocess.run([sys.executable, GENERATE, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), "run `python firmware/abi/generate.py`"


def test_a_change_of_the_description_is_noticed(tmp_path: Path) -> None:
    for part in ("firmware/abi/generate.py", "firmware/abi/monitor.toml"):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / part).write_text((ROOT / part).read_text())
    for part in ("firmware/include", "src/flexserve/monitor", "docs"):
        (tmp_path / part).mkdir(parents=True)
    script = [sys.executable, str(tmp_path / "firmware/abi/generate.py")]
    assert subprocess.run(script, check=False).returncode == 0
    assert subprocess.run([*script, "--check"], check=False).returncode == 0
    source = tmp_path / "firmware/abi/monitor.toml"
    source.write_text(source.read_text().replace("0xC6000101", "0xC60001FF"))
    done = subprocess.run([*script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "abi.h" in done.stdout and "monitor-abi.md" in done.stdout
    source.write_text(source.read_text().replace("0xC60001FF", "0xC6000102"))
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "two calls have one id" in done.stderr


@pytest.mark.parametrize("call", list(abi.Call))
def test_ids_follow_the_calling_convention(call: abi.Call) -> None:
    """Bit 31: a fast call. The owner is the hypervisor (HVC), or the platform (SMC)."""
    assert call >> 31 == 1
    assert (call >> 24) & 0x3F in (0x06, 0x03)
