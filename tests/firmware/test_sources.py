"""The firmware's sources keep their limits, and the table of attacks is the code's."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexserve.worlds.trustzone import attacks, firmware

FIRMWARE = Path(__file__).parents[2] / "firmware"
CODE = {".c", ".h", ".S"}


def lines(folder: str) -> int:
    files = [path for path in (FIRMWARE / folder).iterdir() if path.suffix in CODE]
    return sum(len(path.read_text().splitlines()) for path in files)


def test_the_monitor_stays_small() -> None:
    """EL3 and EL2 with all headers and what they share: at most 4,000 lines."""
    assert sum(lines(folder) for folder in ("el3", "el2", "include", "common")) <= 4000


@pytest.mark.parametrize("path", sorted(FIRMWARE.rglob("*.[cSh]")), ids=lambda path: path.name)
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_every_attack_has_code_and_every_attacks_code_is_described() -> None:
    files = [path for path in (FIRMWARE / "normal").glob("*.c") if path.name != "bench.c"]
    code = "".join(path.read_text() for path in files)
    coded = set(re.findall(r'\{"([a-z0-9-]+)", [a-z_]\w*\}', code))
    described = {attack.id for attack in attacks.attacks() if attack.attacker == "kernel"}
    assert coded == described


def test_every_attack_of_the_managers_code_is_described_with_its_twin() -> None:
    code = (FIRMWARE / "linux" / "attack.c").read_text()
    coded = set(re.findall(r'\{"([a-z-]+)", \w+, (?:true|false), (?:true|false)\}', code))
    rows = [attack for attack in attacks.attacks() if attack.command.startswith("manager ")]
    assert {f"manager attack {name} real" for name in coded} == {row.command for row in rows}
    assert all(row.twin == row.command.replace(" real", " twin") for row in rows)


def test_the_suite_is_as_broad_as_promised() -> None:
    every = attacks.attacks()
    assert len(every) >= 40
    assert len({attack.mechanism for attack in every}) >= 12
    assert len({attack.tried for attack in every}) == len(every), "each attack is distinct"


def test_every_defence_has_an_attack_whose_control_switches_it_off() -> None:
    bits = firmware.defence_bits()
    assert len(set(bits.values())) == len(bits)
    assert {name for attack in attacks.attacks() for name in attack.off} == set(bits)


@pytest.fixture(scope="module")
def sha256(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: install gcc to test the firmware's SHA-256")
    out = tmp_path_factory.mktemp("sha256") / "sha256.so"
    source = FIRMWARE / "el3" / "sha256.c"
    flags = ["-O2", "-shared", "-fPIC", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *flags, f"-I{FIRMWARE / 'include'}", source, "-o", out], check=True)
    return ctypes.CDLL(str(out))


@settings(deadline=None)
@given(data=st.binary(max_size=300))
def test_the_firmwares_sha256_is_sha256(sha256: ctypes.CDLL, data: bytes) -> None:
    digest = ctypes.create_string_buffer(32)
    sha256.sha256(data, ctypes.c_uint64(len(data)), digest)
    assert digest.raw == hashlib.sha256(data).digest()
