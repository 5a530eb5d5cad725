"""`flexserve optimize`, and how `run` uses what it made: through the real secure process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flexserve.bench.generate import write_model
from flexserve.bench.shapes import shape_named
from flexserve.flexmem import repack

from ..schemas import validate
from .conftest import Shell

pytestmark = pytest.mark.skipif(
    repack.why_not() is not None, reason="llama.cpp repacks nothing on this processor"
)
RUN = "run m.flex x --raw --device-key device.key --vendor-pub vendor.pub --temperature 0 --max-tokens 1 --threads 1"
OPTIMIZE = "optimize m.flex --device-key device.key --vendor-pub vendor.pub"


@pytest.fixture(scope="module")
def q4_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("q4") / "m.gguf"
    write_model(shape_named("tiny-llama"), "Q4_0", path)
    return path


@pytest.fixture
def sealed_q4(shell: Shell, q4_gguf: Path) -> Shell:
    shell.ok("keys vendor -o vendor.key")
    shell.ok("keys device -o device.key")
    shell.ok("seal -o m.flex --vendor vendor.key", q4_gguf)
    shell.ok("license m.flex --vendor vendor.key --device device.pub -o m.lic")
    return shell


def test_a_model_that_would_gain_gets_a_hint_until_it_has_a_copy_which_is_then_used(sealed_q4: Shell) -> None:
    shell = sealed_q4
    before = shell(RUN)
    assert "m: plain layout; Q4_0 is faster in execution layout" in before.stderr
    assert "flexserve optimize" in before.stderr
    assert "plain layout" not in shell(RUN, "--no-copy").stderr
    assert "m.flexcopy: tiny-llama" in shell.ok(OPTIMIZE)
    assert (shell.directory / "m.flexcopy").stat().st_mode & 0o777 == 0o600
    after = shell(RUN)
    assert after.exit_code == 0
    assert "plain layout" not in after.stderr


def test_json_says_what_was_made(sealed_q4: Shell) -> None:
    made = sealed_q4.json(OPTIMIZE, "--json", "-o", "elsewhere.copy")
    validate("optimize", made)
    path = sealed_q4.directory / "elsewhere.copy"
    assert made["path"] == "elsewhere.copy"
    assert made["file_bytes"] == path.stat().st_size
    assert made["second_output_bytes"] == 0
    assert "plain layout" not in sealed_q4(RUN, "--copy", path).stderr


def test_a_copy_made_under_an_older_licence_is_not_used_and_the_line_says_so(sealed_q4: Shell) -> None:
    shell = sealed_q4
    shell.ok(OPTIMIZE)
    (shell.directory / "m.lic").unlink()
    shell.ok("license m.flex --vendor vendor.key --device device.pub -o m.lic")
    run = shell(RUN)
    assert run.exit_code == 0
    assert "plain layout; the device copy was made under another licence" in run.stderr
    shell.ok(OPTIMIZE)
    assert "plain layout" not in shell(RUN).stderr


def test_a_damaged_copy_is_not_used_and_damaged_weights_in_it_end_the_request(sealed_q4: Shell) -> None:
    shell = sealed_q4
    shell.ok(OPTIMIZE)
    path = shell.directory / "m.flexcopy"
    good = path.read_bytes()
    path.write_bytes(good[:300] + b"?" + good[301:])
    run = shell(RUN)
    assert run.exit_code == 0
    assert "plain layout; the device copy is not what this device wrote" in run.stderr
    path.write_bytes(good[:-5000] + b"?" * 5000)
    assert "segment_not_authentic" in shell.fails(4, RUN)


def test_without_a_valid_licence_there_is_no_copy_and_a_copy_is_no_licence(sealed_q4: Shell) -> None:
    shell = sealed_q4
    shell.ok(OPTIMIZE)
    shell.ok("keys device -o other.key")
    (shell.directory / "m.lic").unlink()
    shell.ok("license m.flex --vendor vendor.key --device other.pub -o m.lic")
    assert "licence_wrong_device" in shell.fails(5, RUN)
    assert "licence_wrong_device" in shell.fails(5, OPTIMIZE + " -o new.flexcopy")
    assert not (shell.directory / "new.flexcopy").exists()


def test_a_changed_model_is_refused_and_leaves_the_copy_that_is_there(sealed_q4: Shell) -> None:
    shell = sealed_q4
    shell.ok(OPTIMIZE)
    copy = (shell.directory / "m.flexcopy").read_bytes()
    data = bytearray((shell.directory / "m.flex").read_bytes())
    data[-1000] ^= 1
    (shell.directory / "m.flex").write_bytes(data)
    assert "segment_not_authentic" in shell.fails(4, OPTIMIZE)
    assert (shell.directory / "m.flexcopy").read_bytes() == copy
    assert [p.name for p in shell.directory.iterdir() if ".part" in p.name] == []


def test_with_nothing_to_repack_there_is_nothing_to_do_and_that_is_no_error(
    sealed_q4: Shell, tmp_path: Path
) -> None:
    shell = sealed_q4
    write_model(shape_named("tiny-llama"), "F16", tmp_path / "f16.gguf")
    shell.ok("seal -o f16.flex --vendor vendor.key", tmp_path / "f16.gguf")
    shell.ok("license f16.flex --vendor vendor.key --device device.pub -o f16.lic")
    line = OPTIMIZE.replace("m.flex", "f16.flex")
    assert "repacks nothing of" in shell.ok(line)
    assert "nothing to do" in shell.ok(line)
    said = shell.json(f"{line} --json")
    validate("optimize", said)
    assert said["path"] is None
    assert not (shell.directory / "f16.flexcopy").exists()


def test_outputs_that_would_destroy_something_are_refused(sealed_q4: Shell) -> None:
    shell = sealed_q4
    for name in ("m.flex", "m.lic"):
        before = (shell.directory / name).read_bytes()
        assert "is needed as it is" in shell.fails(2, OPTIMIZE, "-o", name)
        assert (shell.directory / name).read_bytes() == before
    shutil.copy(shell.directory / "m.flex", shell.directory / "alone.flex")
    assert "there is no licence" in shell.fails(3, OPTIMIZE.replace("m.flex", "alone.flex"))
    assert "exclude each other" in shell.fails(2, RUN, "--copy", "x", "--no-copy")
    assert "there is no file" in shell.fails(3, RUN, "--copy", "x")
