"""A bench's child processes: one line in, one line out, and nothing that stops the bench reaches them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexserve.bench.child import Child
from flexserve.bench.hog import STEP_BYTES, Hog


def test_a_child_is_in_a_group_of_its_own_and_ends_with_its_input() -> None:
    with Hog() as hog:
        assert hog.hold(STEP_BYTES) == STEP_BYTES
        pid = hog.pid
        assert os.getpgid(pid) == pid
    assert not Path(f"/proc/{pid}").exists()


def test_a_child_that_does_not_look_at_its_input_is_ended_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deaf.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(1000)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("flexserve.bench.child.PATIENCE_S", 0.01)
    with Child("deaf") as child:
        assert child.listen() == "ready\n"
    assert not Path(f"/proc/{child.pid}").exists()
    child.close()
