"""A systemd of its own in new namespaces, on a throw-away copy of this machine's files: what runs a unit in tests.

Nothing outside sees it: files are an overlay in memory, cgroups are below one of ours, the network is a loopback
interface of its own. It starts one unit and what that needs, no login, no journal, no device manager. Takes root and
CAP_SYS_ADMIN. Knows systemd and mounts, and no FlexServe.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SYSTEMD = Path("/lib/systemd/systemd")
_TOOLS = ("unshare", "nsenter", "mount", "pivot_root", "systemctl")
_CAP_SYS_ADMIN = 21
_PR_SET_PDEATHSIG = 1

# $1: a directory for mounts, $2: the name of a cgroup to make below ours, $3: the unit, $4: what prepares its files
_OUTER = r"""set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 box "$1"
mkdir "$1/cgroup" "$1/upper" "$1/work" "$1/root"
mount -t cgroup2 none "$1/cgroup"
own="$1/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)/$2"
mkdir "$own"
echo $$ > "$own/cgroup.procs"
exec unshare --cgroup --pid --fork --kill-child sh -c "$INNER" sh "$@"
"""
_INNER = r"""set -e
root="$1/root"
mount -t overlay box -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sys "$root/sys"
mount -t cgroup2 none "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 dev "$root/dev"
for name in null zero full random urandom tty; do
  touch "$root/dev/$name"
  mount --bind "/dev/$name" "$root/dev/$name"
done
mkdir "$root/dev/shm" "$root/dev/pts"
mount -t devpts -o newinstance,ptmxmode=0666 pts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
mount -t tmpfs -o mode=755 run "$root/run"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
rm -rf "$root"/etc/systemd/system "$root"/lib/systemd/system/*.wants
mkdir -p "$root/etc/systemd/system"
printf '[Unit]\nDefaultDependencies=no\nAllowIsolate=yes\nWants=%s\n' "$3" > "$root/etc/systemd/system/box.target"
ROOT="$root" sh -e -c "$4"
cd "$root"
pivot_root . .
umount -l .
cd /
mount --make-rshared /
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=other /lib/systemd/systemd \
  --unit=box.target --log-target=null --show-status=no --dump-core=no --crash-reboot=no
"""
_SWEEP = r"""mount --make-rprivate /
mount -t cgroup2 none "$1"
find "$1$(sed -n 's/^0:://p' /proc/self/cgroup)/$2" -depth -type d -exec rmdir {} +
"""


def missing() -> str | None:
    """What keeps this machine from running a systemd of its own; None: nothing."""
    absent = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if absent or not SYSTEMD.exists():
        return f"{', '.join(absent) or SYSTEMD} is not installed"
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("CapEff"))
    if os.geteuid() or not int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1:
        return "only root with CAP_SYS_ADMIN may make the namespaces"
    kinds = Path("/proc/filesystems").read_text().split()
    absent = [kind for kind in ("overlay", "cgroup2") if kind not in kinds]
    return f"this kernel has no {', '.join(absent)}" if absent else None


@dataclass(frozen=True)
class Box:
    """A systemd that runs. Process numbers are this machine's, but for those in what `run` prints."""

    init: int

    def run(self, *command: str, timeout_s: float = 60, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """A command as root among what systemd runs, outside of every unit."""
        enter = ("nsenter", "-t", str(self.init), "-m", "-p", "-u", "-i", "-n", "-C", "-r", "-w")
        return subprocess.run(
            [*enter, *command], input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def show(self, unit: str, *names: str) -> dict[str, str]:
        """Properties of a unit, as systemd sees them."""
        done = self.run("systemctl", "show", unit, "-p", ",".join(names))
        assert done.returncode == 0, done.stderr
        return dict(line.split("=", 1) for line in done.stdout.splitlines())

    def file(self, path: str) -> Path:
        """A file of the box, for this process."""
        return Path(f"/proc/{self.init}/root{path}")

    def processes(self, unit: str) -> list[int]:
        """All that belong to a unit, in the order they were started."""
        group = self.show(unit, "ControlGroup")["ControlGroup"]
        listed = self.file(f"/sys/fs/cgroup{group}/cgroup.procs")
        return sorted(map(int, listed.read_text().split())) if group and listed.exists() else []


@contextmanager
def systemd_box(directory: Path, unit: str, prepare: str) -> Iterator[Box]:
    """Run systemd until the end of the block. `prepare`: a shell script that puts the unit's files below $ROOT.
    `directory` exists, is empty and stays so."""
    name = f"box-{os.getpid()}-{time.monotonic_ns()}"
    words = (str(directory), name, unit, prepare)
    outer = subprocess.Popen(
        ["unshare", "--mount", "--uts", "--ipc", "--net", "sh", "-c", _OUTER, "sh", *words],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "INNER": _INNER},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_end_with_us,  # noqa: PLW1509 (one system call)
    )
    try:
        yield Box(_init(outer))
    finally:
        outer.kill()  # systemd dies with it, and all it runs with that
        outer.communicate()
        _sweep(directory, name)


def _end_with_us() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _init(outer: subprocess.Popen[str]) -> int:
    """The process number of systemd once it answers. Raises `AssertionError` with what was printed."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and outer.poll() is None:
        below = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        if below and Path(f"/proc/{below[0]}/comm").read_text().strip() == "systemd":
            box = Box(int(below[0]))
            if box.run("systemctl", "is-system-running").stdout.strip() in (
                "running",
                "degraded",
                "starting",
            ):
                return box.init
        time.sleep(0.05)
    outer.kill()
    raise AssertionError(f"systemd does not start: {outer.communicate()[0]}")


def _sweep(directory: Path, name: str) -> None:
    """Take the empty cgroups away; the kernel takes a moment to notice that they are."""
    words: Sequence[str] = ("unshare", "--mount", "sh", "-c", _SWEEP, "sh", str(directory), name)
    for _ in range(100):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        time.sleep(0.1)
    raise AssertionError(f"cgroups are left: {done.stderr}")
