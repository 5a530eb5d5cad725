"""`flexserve tz doctor`: it names what is missing and what to do, and what this machine cannot enforce."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.schemas import validate

from flexserve.cli import tz
from flexserve.worlds.trustzone import doctor, linux


def test_limits_of_the_machine_are_told_and_are_no_fault() -> None:
    rows = {check.name: check for check in doctor.checks()}
    assert rows["SMMU stage"].state == "limit" and "stage 1" in rows["SMMU stage"].detail
    assert rows["caches, timing, physical access"].state == "limit"


def test_the_report_follows_its_schema() -> None:
    done = CliRunner().invoke(tz.command, ["doctor", "--json"])
    report = json.loads(done.output)
    validate("tz-doctor", report)
    assert done.exit_code == (0 if report["ready"] else 1)


def test_what_is_missing_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(linux, "STORE", tmp_path)
    done = CliRunner().invoke(tz.command, ["doctor"])
    assert done.exit_code == 1
    assert "missing  tools: aarch64-linux-gnu-gcc" in done.output and "apt-get install" in done.output
    assert "missing  linux" in done.output and "make tz-linux" in done.output
