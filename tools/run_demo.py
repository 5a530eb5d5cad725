"""`make run`: from nothing to an answered prompt with the bundled demo model, showing each command as it goes.

Everything it makes lies in ./run and is made once. Afterwards the server goes on until Ctrl-C; with --once it
stops after the answer.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
RUN = Path("run")  # shown as it is typed: relative to the repository
MODEL = Path("models") / "demo-assistant.gguf"
PROMPT = "Wake me up at half past six tomorrow."
FLEXSERVE = Path(sys.executable).parent / "flexserve"


def step(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def flexserve(*arguments: str | Path) -> list[str]:
    """A command line, shown as the user would type it."""
    words = [str(a) for a in arguments]
    print(f"$ flexserve {shlex.join(words)}", flush=True)
    return [str(FLEXSERVE), *words]


def call(*arguments: str | Path) -> None:
    code = subprocess.run(flexserve(*arguments), cwd=ROOT, check=False).returncode
    if code != 0:
        sys.exit(code)


def prepare() -> None:
    """Keys, sealed model and licence, where they are missing or older than the model."""
    (ROOT / RUN).mkdir(mode=0o700, exist_ok=True)
    step("keys: the vendor signs and seals, the device unwraps")
    for kind in ("vendor", "device"):
        if not (ROOT / RUN / f"{kind}.key").exists():
            call("keys", kind, "-o", RUN / f"{kind}.key")
        else:
            print(f"{RUN / kind}.key is there")
    step("sealed model and licence: made by the vendor, useless on any other device")
    sealed, licence = ROOT / RUN / "demo.flex", ROOT / RUN / "demo.lic"
    if not sealed.exists() or sealed.stat().st_mtime < (ROOT / MODEL).stat().st_mtime:
        sealed.unlink(missing_ok=True)
        licence.unlink(missing_ok=True)
        call("seal", MODEL, "-o", RUN / "demo.flex", "--vendor", RUN / "vendor.key")
    if not licence.exists():
        call(
            "license", RUN / "demo.flex", "--vendor", RUN / "vendor.key",
            "--device", RUN / "device.pub", "-o", RUN / "demo.lic",
        )  # fmt: skip
    print(f"{RUN / 'demo.flex'}, {RUN / 'demo.lic'}")


def wait_ready(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(server.returncode or 1)  # it has said why
        try:
            if httpx.get(f"{url}/health", timeout=1).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    server.terminate()
    sys.exit("error: the server did not get ready within a minute")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop the server after the answer")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    prepare()
    step("server: the secure world is a process of its own")
    admin = RUN / "admin.sock"
    arguments = flexserve(
        "serve", "--model", f"demo={RUN / 'demo.flex'},{RUN / 'demo.lic'}", "--device-key", RUN / "device.key",
        "--vendor-pub", RUN / "vendor.pub", "--port", str(options.port), "--admin-socket", admin,
    )  # fmt: skip
    server = subprocess.Popen(arguments, cwd=ROOT)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    url = f"http://127.0.0.1:{options.port}"
    try:
        wait_ready(server, url)
        step("one prompt, answered cold: the weights are decrypted while the first tokens are computed")
        call("run", "demo", "--admin-socket", admin, "--temperature", "0", "--verbose", PROMPT)
        if options.once:
            return
        step(f"serving on {url} until Ctrl-C; for example:")
        print(
            f"  curl {url}/v1/chat/completions -d "
            """'{"model": "demo", "messages": [{"role": "user", "content": "Turn off the kitchen lights"}]}'"""
            f"\n  .venv/bin/flexserve run demo --admin-socket {admin}\n"
            f"  .venv/bin/flexserve ps --admin-socket {admin}",
            flush=True,
        )
        server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
