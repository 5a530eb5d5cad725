"""Each line of packaging/flexserve.service counts: without it systemd finds the service more exposed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ..hostile.test_threat_model import UNIT, settings

# What `systemd-analyze security` does not look at; test_unit.py does, where a service runs.
NOT_SCORED = {
    "LoadCredential", "StateDirectory", "StateDirectoryMode", "RuntimeDirectory", "RuntimeDirectoryMode",
    "MemorySwapMax", "LimitMEMLOCK", "LimitCORE", "SystemCallErrorNumber",
}  # fmt: skip
MOST_EXPOSED = 2.5
pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")


def exposure(directory: Path, text: str) -> tuple[set[str], float]:
    """What systemd finds closed, and its verdict: 0 is closed, 10 open."""
    path = directory / "flexserve.service"
    path.write_text(text)
    command = ["systemd-analyze", "security", "--offline=true", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    verdict = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    if verdict is None:
        pytest.skip(f"this systemd cannot judge a file: {done.stderr.strip()}")
    listed = subprocess.run(
        [*command, "--json=short"], capture_output=True, text=True, timeout=60, check=False
    )
    return {item["name"] for item in json.loads(listed.stdout) if item["set"]}, float(verdict[1])


def test_systemd_finds_little_of_it_exposed(tmp_path: Path) -> None:
    assert exposure(tmp_path, UNIT.read_text())[1] <= MOST_EXPOSED


@pytest.mark.parametrize("line", [line for line in settings() if line.partition("=")[0] not in NOT_SCORED])
def test_without_a_line_the_service_is_more_exposed(tmp_path: Path, line: str) -> None:
    text = UNIT.read_text()
    before, _ = exposure(tmp_path, text)
    after, _ = exposure(tmp_path, text.replace(f"\n{line}\n", "\n"))
    assert before - after, "a line that changes nothing is not worth having"
