from __future__ import annotations

import subprocess
import sys

import pytest

from flexserve.cli.main import VERBS

from .conftest import Shell

PROGRAM = [sys.executable, "-c", "from flexserve.cli import main; main()"]


def test_help_lists_verbs_without_importing_any() -> None:
    code = (
        "import sys, atexit\n"
        "from flexserve.cli.main import cli\n"
        "def loaded():\n"
        "    heavy = {'numpy', 'cryptography', 'msgspec', 'starlette', 'llama_cpp', 'gguf', 'jinja2'}\n"
        "    sys.stderr.write(' '.join(sorted(heavy & set(sys.modules))))\n"
        "atexit.register(loaded)\n"
        "cli(['--help'])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for verb in ("keys", "seal", "license", "inspect", "verify"):
        assert f"  {verb} " in run.stdout
    assert run.stderr == ""


def test_a_verb_whose_module_is_missing_is_not_there(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERBS, "fly", ("no_such_module", "fly away"))
    assert "fly" not in shell.ok("--help")
    assert "no such command 'fly'" in shell.fails(2, "fly")


def test_every_listed_verb_loads_and_explains_itself(shell: Shell) -> None:
    listed = [name for name in VERBS if f"  {name} " in shell.ok("--help")]
    assert {"keys", "seal", "license", "inspect", "verify"} <= set(listed)
    for name in listed:
        assert shell.ok(f"{name} --help").startswith(f"Usage: flexserve {name}")


def test_errors_are_lower_case_with_a_hint_and_a_code(shell: Shell) -> None:
    assert shell.fails(2, "seal") == (
        "error: missing argument 'MODEL.gguf' (usage)\nhint: `flexserve seal --help` shows how it is called\n"
    )
    assert shell.fails(3, "inspect none.flex") == (
        "error: there is no sealed model none.flex (not_found)\nhint: check the name and the directory\n"
    )
    assert shell("").exit_code == 2


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("budget 2X", "invalid value for 'SIZE': '2X' is not a size like 512M, 1.5G or 1GB (usage)"),
        (
            "serve --model m=m.flex --port 80x",
            "invalid value for '--port': '80x' is not a valid integer (usage)",
        ),
        ("fly", "no such command 'fly' (usage)"),
    ],
)
def test_a_wrong_call_is_explained_as_every_other_error_is(shell: Shell, line: str, error: str) -> None:
    assert shell.fails(2, line).startswith(f"error: {error}\nhint: `flexserve")


def test_the_program_itself_reports_its_version_and_its_errors() -> None:
    run = subprocess.run([*PROGRAM, "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == "flexserve 0.1.0\n"
    bad = subprocess.run([*PROGRAM, "inspect", "/"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ")
    assert "Traceback" not in bad.stderr
