from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from flexserve.bench.generate import write_model
from flexserve.bench.shapes import ModelShape
from flexserve.sealed.seal import THREADS

from ..engine.test_trial import OLMO2, olmo2
from .conftest import Shell


def test_sealing_says_what_it_made(shell: Shell, tiny_gguf: Path) -> None:
    shell.ok("keys vendor -o vendor.key")
    out = shell.ok("seal -o m.flex --vendor vendor.key", tiny_gguf)
    assert out.startswith("m.flex: tiny-with-random-weights version 1, ")
    assert {p.name for p in shell.directory.iterdir()} == {"vendor.key", "vendor.pub", "m.flex"}


def test_bad_calls_have_their_own_exit_codes_and_leave_nothing(shell: Shell, tiny_gguf: Path) -> None:
    shell.ok("keys vendor -o vendor.key")
    shell.ok("keys device -o device.key")
    before = {p.name for p in shell.directory.iterdir()}
    shell.fails(3, "seal none.gguf -o m.flex --vendor vendor.key")
    shell.fails(3, "seal -o m.flex --vendor none.key", tiny_gguf)
    shell.fails(6, "seal -o m.flex --vendor device.key", tiny_gguf)
    assert "the .key file" in shell.fails(6, "seal -o m.flex --vendor vendor.pub", tiny_gguf)
    shell.fails(2, "seal -o m.flex --vendor vendor.key --id two/words", tiny_gguf)
    shell.fails(2, "seal -o m.flex --vendor vendor.key --version 0", tiny_gguf)
    assert "model_malformed" in shell.fails(4, "seal vendor.pub -o m.flex --vendor vendor.key")
    shell.fails(8, "seal -o none/m.flex --vendor vendor.key", tiny_gguf)
    assert {p.name for p in shell.directory.iterdir()} == before


def test_a_sealed_model_is_not_replaced_unless_that_is_said(sealed: Shell, tiny_gguf: Path) -> None:
    """Its licences would be useless, and no other copy may exist."""
    before = (sealed.directory / "m.flex").read_bytes()
    error = sealed.fails(2, "seal -o m.flex --vendor vendor.key", tiny_gguf)
    assert error.startswith("error: m.flex exists already (usage)\nhint: give another name, or --force")
    assert (sealed.directory / "m.flex").read_bytes() == before
    sealed.ok("seal -o m.flex --vendor vendor.key --force", tiny_gguf)
    assert (sealed.directory / "m.flex").read_bytes() != before


def test_ctrl_c_and_sigterm_leave_no_file(shell: Shell, tmp_path: Path) -> None:
    shell.ok("keys vendor -o vendor.key")
    big = tmp_path / "big.gguf"
    write_model(ModelShape("big", "llama", 8, 512, 2048, 8, 4, 64, 512, 64, 1e4, 1e-5, False), "F16", big)
    slow = (  # every chunk waits until the signal has come
        "import flexserve.sealed.seal as s, os, sys, threading\n"
        "write, end, gate = s.BulkWriter.write, s._Encryptor._end, threading.Event()\n"
        "def waits(*a):\n    os.write(1, b'w'); gate.wait(60); write(*a)\n"
        "def ends(*a):\n    end(*a); gate.set()\n"
        "s.BulkWriter.write, s._Encryptor._end = waits, ends\n"
        "from flexserve.cli import main\n"
        "sys.argv[0] = 'flexserve'; main()\n"
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        arguments = ["seal", str(big), "-o", "big.flex", "--vendor", "vendor.key"]
        with subprocess.Popen(
            [sys.executable, "-c", slow, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            assert child.stdout.read(1) == b"w"
            child.send_signal(number)
            more, err = child.communicate(timeout=60)
        assert (child.returncode, err.strip()) == (130, b"error: interrupted")
        assert len(more) <= THREADS - 1  # of 48 chunks: each thread stopped after the one it had
        assert {p.name for p in shell.directory.iterdir()} == {"vendor.key", "vendor.pub"}


def test_a_model_with_general_rules_only_is_tried_and_the_vendor_is_told(shell: Shell) -> None:
    shell.ok("keys vendor -o vendor.key")
    gguf = shell.directory / "olmo.gguf"
    gguf.write_bytes(olmo2().to_bytes())
    result = shell("seal -o olmo.flex --vendor vendor.key", gguf)
    assert result.exit_code == 0
    assert f"architecture '{OLMO2}' has general rules only" in result.stderr
    whole = olmo2()
    gguf.write_bytes(replace(whole, weights=whole.weights[:-1], data=None).to_bytes())
    assert "could not load this model" in shell.fails(7, "seal -o other.flex --vendor vendor.key", gguf)
    assert not (shell.directory / "other.flex").exists()
