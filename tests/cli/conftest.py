from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flexserve.bench.generate import write_model
from flexserve.cli.main import cli
from flexserve.worlds.fake import write_fake_model
from flexserve.worlds.linux import hardening

from ..sealed_fixtures import TINY


@dataclass(frozen=True)
class Shell:
    """A home directory of its own, and `flexserve` called in it."""

    directory: Path

    def __call__(self, line: str, *more: str | Path) -> Result:
        """Call `flexserve LINE MORE...`; words of LINE are split at spaces."""
        result = CliRunner().invoke(cli, [*line.split(), *map(str, more)], prog_name="flexserve")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    def ok(self, line: str, *more: str | Path) -> str:
        """What it printed; it must succeed."""
        result = self(line, *more)
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, line: str, *more: str | Path) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self(line, *more).stdout)
        return value

    def fails(self, code: int, line: str, *more: str | Path) -> str:
        """What it said on stderr; it must fail with exactly this exit code."""
        result = self(line, *more)
        assert result.exit_code == code, result.output
        assert result.stderr.startswith("error: ") or "\nerror: " in result.stderr
        return result.stderr


@pytest.fixture(autouse=True)
def _keep_privileges(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` gives privileges up for good, and here it would be the tests that lose them.

    That it does is tested on processes of its own (tests/worlds/test_hardening.py, test_two_users.py).
    """
    monkeypatch.setattr(hardening, "harden_gateway", lambda: None)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return Shell(work)


@pytest.fixture
def demo(shell: Shell) -> Shell:
    """A shell whose directory has demo.flex and demo.lic for the fake world."""
    write_fake_model(shell.directory, "demo")
    return shell


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_model(TINY, "Q8_0", path)
    return path


@pytest.fixture
def sealed(shell: Shell, tiny_gguf: Path) -> Shell:
    """A shell whose directory has m.flex, m.lic, vendor.key, vendor.pub, device.key, device.pub."""
    shell.ok("keys vendor -o vendor.key")
    shell.ok("keys device -o device.key")
    shell.ok("seal -o m.flex --vendor vendor.key --id demo --version 3", tiny_gguf)
    shell.ok("license m.flex --vendor vendor.key --device device.pub -o m.lic")
    return shell
