"""Build llama.cpp's wheel once, with progress, into .cache/wheels. Standard library only: it runs before the rest.

There is no wheel of llama-cpp-python to download: its source is compiled for this machine's processor, which
takes a few minutes. `python tools/build_llama.py` does nothing when the wheel is there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / ".cache" / "wheels"
LOG = ROOT / ".cache" / "build-llama.log"
PROGRESS = re.compile(r"\[(\d+)/(\d+)\]")


def pinned() -> str:
    """The version in pyproject.toml."""
    found = re.search(r'"llama-cpp-python==([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    if found is None:
        sys.exit("error: pyproject.toml does not pin llama-cpp-python")
    return found[1]


def main() -> None:
    version = pinned()
    if list(WHEELS.glob(f"llama_cpp_python-{version}-*.whl")):
        return
    if shutil.which("c++") is None and shutil.which("g++") is None:
        sys.exit("error: a C++ compiler is needed to build llama.cpp\nhint: apt-get install g++ make")
    WHEELS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-binary", "llama-cpp-python"]
    command += [f"llama-cpp-python=={version}", "-w", str(WHEELS)]
    # Our own server and no images: what is not needed is not built.
    environment = os.environ | {"CMAKE_ARGS": os.environ.get("CMAKE_ARGS", "-DLLAVA_BUILD=OFF")}
    start = time.monotonic()
    print(f"building llama.cpp {version} for this machine (once; a few minutes on two cores)", flush=True)
    shown = -1
    with (
        LOG.open("w") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as build,
    ):
        assert build.stdout is not None
        for line in build.stdout:
            log.write(line)
            if (step := PROGRESS.search(line)) is None:
                continue
            percent = 100 * int(step[1]) // int(step[2])
            if sys.stdout.isatty():
                print(f"\r  {percent:3d} %  {time.monotonic() - start:4.0f} s", end="", flush=True)
            elif percent // 10 > shown // 10:
                print(f"  {percent} %  {time.monotonic() - start:.0f} s", flush=True)
            shown = percent
    if sys.stdout.isatty():
        print()
    if build.returncode != 0:
        tail = "".join(LOG.read_text().splitlines(keepends=True)[-30:])
        sys.exit(f"{tail}\nerror: llama.cpp did not build; the whole log is {LOG}")
    print(f"  built in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
