"""`flexserve serve` on the linux world as a user starts it: real processes, in a home directory of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from flexserve.server.client import ServerClient
from flexserve.worlds.base import ModelSource

from .attacker import as_same_user
from .world_fixtures import Device

READY = "FlexServe is ready at "
# The worst case for a test of dumps: the user allows core files of any size.
_CORES = "import resource as r; r.setrlimit(r.RLIMIT_CORE, (r.getrlimit(r.RLIMIT_CORE)[1],) * 2)\n"
_UNHARDENED = (
    "import functools, flexserve.worlds.linux as w\n"
    "w.LinuxWorld = functools.partial(w.LinuxWorld, hardened=False)\n"
)
_SERVE = "from flexserve.cli import main; main()\n"


@dataclass(frozen=True)
class Served:
    """A server that is ready. Everything it may write lies below `directory`."""

    process: subprocess.Popen[str]
    directory: Path
    url: str

    @property
    def admin(self) -> Path:
        return self.directory / "a.sock"

    @property
    def secure_pid(self) -> int:
        return ServerClient(self.admin).ps().pid

    def complete(self, prompt: str, **more: Any) -> httpx.Response:
        """One answer of 24 tokens, greedily."""
        body = {
            "model": "m",
            "prompt": prompt,
            "max_tokens": 24,
            "temperature": 0,
            "ignore_eos": True,
            **more,
        }
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def stop(self) -> None:
        """End it, with what it prints going to files in `directory`."""
        self.process.terminate()
        out, _ = self.process.communicate(timeout=60)
        (self.directory / "work" / "stdout.txt").write_text(out)
        assert self.process.returncode == 0


@contextmanager
def served(
    device: Device,
    source: ModelSource,
    directory: Path,
    *,
    hardened: bool = True,
    more: Sequence[str] = (),
) -> Iterator[Served]:
    """Serve one model under the name `m`, as a user without capabilities; killed at the end if still there. `more`:
    of the command line."""
    d = directory
    for name in ("home", "tmp", "work", "config", "state", "run"):
        (d / name).mkdir(mode=0o700, exist_ok=True)
    d.chmod(0o700)
    environment = {
        "HOME": str(d / "home"),
        "TMPDIR": str(d / "tmp"),
        "PATH": "/usr/bin:/bin",
        **{f"XDG_{n.upper()}_HOME": str(d / n) for n in ("config", "state")},
        "XDG_RUNTIME_DIR": str(d / "run"),
    }
    model = f"m={source.sealed},{source.licence}"
    if source.adapter is not None:
        model += f",adapter={source.adapter.sealed},{source.adapter.licence},scale={source.adapter.scale}"
    words = [
        "serve", "--model", model, "--device-key", str(device.key_path),
        "--vendor-pub", str(device.vendor_path), "--port", "0", "--admin-socket", str(d / "a.sock"),
        "--threads", "1",  # more of them wait for each other where other programs keep a processor busy
        "--no-calibrate", *more,
    ]  # fmt: skip
    code = _CORES + ("" if hardened else _UNHARDENED) + _SERVE
    with (d / "work" / "stderr.txt").open("w") as stderr:
        process = as_same_user(
            lambda: subprocess.Popen(
                [sys.executable, "-c", code, *words],
                cwd=d / "work",
                env=environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        )
    with when_ready(process, d) as server:
        yield server


@contextmanager
def when_ready(process: subprocess.Popen[str], directory: Path) -> Iterator[Served]:
    """The server that this process is about to be; killed at the end if still there. Its stderr goes to a file."""
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith(READY), (directory / "work" / "stderr.txt").read_text()
            yield Served(process, directory, line.removeprefix(READY).split()[0])
        finally:
            if process.poll() is None:
                process.kill()
