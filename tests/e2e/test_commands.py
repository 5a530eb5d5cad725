"""The documented command lines, typed one after the other as a new user would, with the real demo model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import jsonschema
import pytest

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "models" / "demo-assistant.gguf"
PROMPT = "Wake me up at half past six tomorrow."


@dataclass(frozen=True)
class Shell:
    """A directory, a home of its own, and `flexserve` in both."""

    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        home = self.directory / "home"
        return {"HOME": str(home), "PATH": os.environ["PATH"], "TMPDIR": str(self.directory)}

    def command(self, words: Sequence[str | Path]) -> list[str]:
        return [str(Path(sys.executable).parent / "flexserve"), *map(str, words)]

    def __call__(self, *words: str | Path, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(words),
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == exit_code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """After `keys`, `seal`, `license` and `keys trust`, exactly as the README says."""
    shell = Shell(tmp_path_factory.mktemp("device"))
    (shell.directory / "home").mkdir()
    shell("keys", "vendor", "-o", "vendor.key")
    shell("keys", "device", "-o", "device.key")
    shell("seal", DEMO, "-o", "M.flex", "--vendor", "vendor.key", "--id", "demo", "--version", "1")
    shell("license", "M.flex", "--vendor", "vendor.key", "--device", "device.pub", "-o", "M.lic")
    shell("keys", "trust", "vendor.pub")
    return shell


RUN = ("run", "M.flex", "--license", "M.lic", "--device-key", "device.key")


def test_verify_says_every_segment_is_authentic(shell: Shell) -> None:
    shell(
        "verify", "M.flex", "--license", "M.lic", "--device-key", "device.key", "--vendor-pub", "vendor.pub"
    )  # fmt: skip


def test_run_answers_the_demo_prompt_greedily_with_the_right_call(shell: Shell) -> None:
    done = shell(*RUN, "--temperature", "0", "--json", PROMPT)
    result = json.loads(done.stdout)
    jsonschema.validate(result, json.loads((ROOT / "docs" / "schemas" / "run.json").read_text()))
    assert result["finish_reason"] == "stop"
    call = json.loads(result["text"].splitlines()[-1])
    assert call["tool"] == "set_alarm"
    assert call["time"] == "06:30"
    assert len(result["token_ids"]) == result["timings"]["output_tokens"]
    again = json.loads(shell(*RUN, "--temperature", "0", "--json", PROMPT).stdout)
    assert again["token_ids"] == result["token_ids"]


def test_raw_means_no_chat_template(shell: Shell) -> None:
    chat, raw = (
        json.loads(shell(*RUN, *flag, "--temperature", "0", "--max-tokens", "4", "--json", PROMPT).stdout)
        for flag in ((), ("--raw",))
    )
    assert raw["timings"]["prompt_tokens"] < chat["timings"]["prompt_tokens"]


def test_the_wrong_things_have_exit_codes_of_their_own(shell: Shell) -> None:
    d = shell.directory
    shell("run", "absent.flex", "--license", "M.lic", "--device-key", "device.key", "x", exit_code=3)
    shell(*RUN, "--no-such-option", "x", exit_code=2)
    damaged = bytearray((d / "M.flex").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (d / "damaged.flex").write_bytes(damaged)
    done = shell("run", "damaged.flex", "--license", "M.lic", "--device-key", "device.key", "x", exit_code=4)
    assert "segment_not_authentic" in done.stderr
    shell("keys", "device", "-o", "other.key")
    done = shell("run", "M.flex", "--license", "M.lic", "--device-key", "other.key", "x", exit_code=5)
    assert "licence_wrong_device" in done.stderr
    shell("keys", "vendor", "-o", "stranger.key")
    done = shell(*RUN, "--vendor-pub", "stranger.pub", "x", exit_code=4)
    assert "vendor_not_trusted" in done.stderr
    (d / "device.key").chmod(0o644)
    assert "key_permissions" in shell(*RUN, "x", exit_code=6).stderr
    (d / "device.key").chmod(0o600)


def test_serve_answers_over_http_and_ps_shows_it(shell: Shell) -> None:
    admin = shell.directory / "admin.sock"
    words = (
        "serve", "--model", "demo=M.flex,M.lic", "--device-key", "device.key", "--vendor-pub", "vendor.pub",
        "--port", "0", "--admin-socket", admin, "--no-prefetch", "--pin", "demo",
    )  # fmt: skip
    with subprocess.Popen(
        shell.command(words),
        cwd=shell.directory,
        env=shell.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            ready = server.stdout.readline()
            url = next(word for word in ready.split() if word.startswith("http://"))
            body = {
                "model": "demo",
                "temperature": 0,
                "messages": [{"role": "user", "content": PROMPT}],
            }
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
            assert '"set_alarm"' in answer["choices"][0]["message"]["content"]
            status = json.loads(shell("ps", "--admin-socket", admin, "--json").stdout)
            jsonschema.validate(status, json.loads((ROOT / "docs" / "schemas" / "ps.json").read_text()))
            assert (status["prefetch"], status["models"][0]["pinned"]) == (False, True)
            shown = shell("ps", "--admin-socket", admin).stdout
            assert "Prefetch: off" in shown
            assert shown.splitlines()[-1].endswith("pinned")
            assert "demo" in shell("list", "--admin-socket", admin).stdout
            named = shell("run", "demo", "--admin-socket", admin, "--temperature", "0", "--json", PROMPT)
            assert json.loads(named.stdout)["text"] == answer["choices"][0]["message"]["content"]
        finally:
            server.terminate()
    assert server.returncode == 0
