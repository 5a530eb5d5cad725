"""Ctrl-C and SIGTERM end a call with 130 and clean up, whoever else the signal reaches."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from flexserve.cli.common import sigterm_interrupts, was_interrupted
from flexserve.cli.main import EXIT_INTERRUPTED, cli
from flexserve.errors import WorldCrashed

PROGRAM = [sys.executable, "-c", "from flexserve.cli import main; main()"]
PATIENCE_S = 60.0
WORLDS = 2  # of a soak


def eventually(condition: Callable[[], object]) -> None:
    pause, end = threading.Event(), time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never happened"
        pause.wait(0.01)


def descendants(pid: int) -> set[int]:
    """All processes that it started, and those that they started."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = {int(child) for child in task.read_text().split()}
        except OSError:  # it ended
            continue
        found |= children.union(*map(descendants, children))
    return found


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_bench_whose_group_is_signalled_ends_as_interrupted_and_leaves_nothing(
    tmp_path: Path, number: int
) -> None:
    words = ["bench", "soak", "--minutes", "30", "--shape", "tiny-llama", "--quant", "Q8_0", "--directory"]
    bench = subprocess.Popen(
        [*PROGRAM, *words, str(tmp_path)], stdout=-1, stderr=-1, text=True, start_new_session=True
    )
    try:
        eventually(lambda: bench.poll() is not None or list(tmp_path.glob("*/stormy/*")))
        eventually(lambda: bench.poll() is not None or len(descendants(bench.pid)) >= WORLDS)
        begun = descendants(bench.pid)
        os.killpg(bench.pid, number)
        if number == signal.SIGTERM:
            os.killpg(bench.pid, number)  # `timeout` does it twice
        out, err = bench.communicate(timeout=PATIENCE_S)
    finally:
        bench.kill()
        bench.communicate()
    assert bench.returncode == EXIT_INTERRUPTED, err
    assert out == ""
    assert err.endswith("error: interrupted\n")
    assert "Traceback" not in err
    assert "world_crashed" not in err
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    eventually(lambda: not any(map(is_running, begun)))


def test_a_sigterm_that_comes_twice_does_not_interrupt_the_cleaning_up() -> None:
    cleaned = False
    with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned = True
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_error_that_follows_from_a_sigterm_is_the_interruption() -> None:
    def fail() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise WorldCrashed("the secure world ended")

    with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
        fail()


def test_an_error_without_a_signal_stays_what_it_is() -> None:
    with pytest.raises(WorldCrashed) as caught, sigterm_interrupts():
        raise WorldCrashed("the secure world ended")
    assert not was_interrupted(caught.value)


@pytest.mark.parametrize("error", [WorldCrashed("the world is closed"), OSError("gone")])
def test_an_error_while_ctrl_c_is_obeyed_is_shown_as_the_interruption(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(_options: object, _directory: Path, _say: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise error

    monkeypatch.setattr("flexserve.demo.agents.run", main)
    done = CliRunner().invoke(cli, ["demo", "agents"])
    assert (done.exit_code, done.stderr) == (EXIT_INTERRUPTED, "error: interrupted\n")
