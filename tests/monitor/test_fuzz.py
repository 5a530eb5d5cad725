"""The call decoder under mutated inputs, guided by coverage: no input breaks an invariant or the C language's rules."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from .host_build import CALLS, build

COVERAGE = ("-fsanitize=undefined", "-fsanitize-coverage=trace-pc")


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("fuzz") / "fuzz", (*CALLS, "host/fuzz.c"), *COVERAGE)


def fuzz(program: Path, seed: int, inputs: int) -> tuple[int, int]:
    """Edges reached and inputs kept."""
    done = subprocess.run([program, str(seed), str(inputs)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    numbers = re.fullmatch(r"(\d+) executions, (\d+) edges, (\d+) inputs kept\n", done.stdout)
    assert numbers is not None and int(numbers[1]) == inputs
    return int(numbers[2]), int(numbers[3])


def test_mutated_inputs_break_nothing_and_reach_ever_more_of_the_code(fuzzer: Path) -> None:
    few, _ = fuzz(fuzzer, 1, 20)
    many, kept = fuzz(fuzzer, 1, 1000)
    assert many > few and kept > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_a_hundred_thousand_inputs_break_nothing(fuzzer: Path, seed: int) -> None:
    fuzz(fuzzer, seed, 25_000)


def test_control_without_scrubbing_the_fuzzer_finds_the_residue(tmp_path: Path) -> None:
    off = tmp_path / "off.c"
    off.write_text('#include "defences.h"\nu64 defences_off = D_SCRUB;\n')
    flags = (*COVERAGE, "-DCONTROLS", str(off))
    program = build(tmp_path / "fuzz", (*CALLS, "host/fuzz.c"), *flags)
    done = subprocess.run([program, "1", "20000"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "broken: the normal world can read a secret" in done.stderr
