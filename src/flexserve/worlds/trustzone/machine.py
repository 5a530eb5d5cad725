"""One emulated Arm machine: starts QEMU on a flash image, talks to its serial lines, ends it.

The first serial line is the normal world's, on stdio. The second is reachable from the secure world only and goes to
a file. Devices that could copy memory: two that QEMU always has (fw_cfg, and virtio-mmio without a device behind it),
which stage 2 hides from the normal world; and PCI functions, behind the SMMU: none unless `options` names them.
"""

from __future__ import annotations

import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from ...errors import EngineFailure
from .firmware import QEMU_NAME

QEMU = QEMU_NAME
SECURE = "secure"
DISK_BYTES = 1 << 20
MACHINE = "virt,secure=on,virtualization=on,gic-version=3,highmem=off,its=off,iommu=smmuv3"
ARGUMENTS = f"-M {MACHINE} -cpu cortex-a76 -smp 2 -m 1G -nic none -display none -monitor none".split()


class Hung(EngineFailure):
    """The machine did not answer in time, or ended."""


class Ended(Hung):
    """The machine has ended."""


class Machine:
    """A running machine. Use as a context manager: it ends with the block.

    `loaded`: what lies in normal DRAM from the start, by address. `options`: more of QEMU's; `{folder}` in
    them is the machine's own, which has an empty `disk`.
    """

    def __init__(
        self, flash: bytes, loaded: Mapping[int, bytes] | None = None, options: tuple[str, ...] = ()
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="flexserve-tz-")
        folder = Path(self._directory.name)
        self._secure = folder / SECURE
        self._process = subprocess.Popen(
            _command(folder, flash, loaded or {}, ("-serial", "stdio"), options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\r\n"))
        self._lines.put(None)

    def send(self, line: str) -> None:
        """Type a line into the normal world's serial line. Raises `Hung` when the machine has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Ended(f"the machine has ended before {line!r}") from None

    def line(self, timeout_s: float = 30) -> str:
        """The next line it prints. Raises `Hung`."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise Hung(
                f"the machine was silent for {timeout_s:.0f} s; secure side: {self.secure()}"
            ) from None
        if line is None:
            raise Ended(f"the machine has ended; secure side: {self.secure()}")
        return line

    def wait_for(self, start: str, timeout_s: float = 30) -> str:
        """The next line that begins with `start`. Raises `Hung`."""
        deadline = time.monotonic() + timeout_s
        while True:
            line = self.line(max(deadline - time.monotonic(), 0.01))
            if line.startswith(start):
                return line

    def secure(self) -> str:
        """What the secure world has printed."""
        return self._secure.read_text(errors="replace") if self._secure.exists() else ""

    def wait_for_secure(self, text: str, timeout_s: float = 30) -> None:
        """Until the secure world has printed `text`. Raises `Hung`."""
        deadline = time.monotonic() + timeout_s
        while text not in self.secure():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise Hung(f"the secure world did not say {text!r} but {self.secure()!r}")
            time.sleep(0.02)

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._directory.cleanup()


def _command(
    folder: Path, flash: bytes, loaded: Mapping[int, bytes], serial: tuple[str, ...], options: tuple[str, ...]
) -> list[str]:
    """QEMU with its files in `folder`."""
    (folder / "flash").write_bytes(flash)
    (folder / "disk").write_bytes(bytes(DISK_BYTES))
    devices = [option.replace("{folder}", str(folder)) for option in options]
    for address, content in loaded.items():
        file = folder / f"{address:x}"
        file.write_bytes(content)
        devices += ["-device", f"loader,file={file},addr={address:#x},force-raw=on"]
    secure = ["-serial", f"file:{folder / SECURE}"]
    return [QEMU, *ARGUMENTS, "-bios", str(folder / "flash"), *serial, *secure, *devices]


def interact(flash: bytes, loaded: Mapping[int, bytes]) -> int:
    """Run a machine on the caller's own terminal until it ends; QEMU's exit code. Control-C is the machine's."""
    serial = ("-chardev", "stdio,id=terminal,signal=off", "-serial", "chardev:terminal")
    with tempfile.TemporaryDirectory(prefix="flexserve-tz-") as folder:
        return subprocess.run(_command(Path(folder), flash, loaded, serial, ()), check=False).returncode


def qemu_version() -> str:
    """As QEMU says it."""
    out = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    return out.splitlines()[0].removeprefix("QEMU emulator version ")
