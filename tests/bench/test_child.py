"""A bench's child processes: one line in, one line out, and nothing that stops the bench reaches them."""

from __future__ import annotations

import os
from pathlib import Path

from flexserve.bench.hog import STEP_BYTES, Hog


def test_a_child_is_in_a_group_of_its_own_and_ends_with_its_input() -> None:
    with Hog() as hog:
        assert hog.hold(STEP_BYTES) == STEP_BYTES
        pid = hog.pid
        assert os.getpgid(pid) == pid
    assert not Path(f"/proc/{pid}").exists()
