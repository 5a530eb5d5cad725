"""What this machine and this installation protect, line by line, measured: `flexserve doctor`.

Each line says what was found, which attacker that stops and what to do where it is missing. The secure process
is looked at from outside by probe.py; everything else is read here, and judged by functions that take what they
judge as arguments. docs/threat-model.md says what the lines together are worth.
"""

from __future__ import annotations

import os
import pwd
import re
import stat
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

from ... import __version__
from ...errors import FlexServeError
from ...sealed.keyfile import check_secret_file
from ...sealed.trust import TrustStore
from . import calibration, landlock, users
from .channel import Measures
from .probe import Look, Probe, probe

ALLOWED_VARIABLES = frozenset({"GGML_NO_BACKTRACE", "CREDENTIALS_DIRECTORY"})

SAME_USER = "another program of this user"
OTHER_USERS = "other users of this machine"
_PACKAGES = ("site-packages", "dist-packages")


class State(StrEnum):
    """Of one line. Only BROKEN is a promise of this version that does not hold."""

    OK = "ok"
    WEAK = "weak"  # this machine could protect more
    BROKEN = "broken"
    UNUSED = "unused"  # this version does not do it, or nothing was given to check


class Mode(StrEnum):
    """Who has to be trusted: `SINGLE_USER` every program of the user, `SERVICE` root."""

    SINGLE_USER = "single-user"
    SERVICE = "service"


@dataclass(frozen=True)
class Line:
    """One thing that was checked. `id` is stable; `stops` is the attacker against whom it helps (or would,
    where it is not there), empty where it stops nobody; `advice` is empty where nothing is to be done."""

    id: str
    state: State
    found: str
    stops: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """Everything `flexserve doctor` says. `holds`: whatever this version promises holds here."""

    version: str
    world: str
    mode: Mode
    user_id: int
    holds: bool
    lines: tuple[Line, ...]


def examine(device_key: str | None, trust: TrustStore | None = None) -> Report:
    """Look at this machine as the user who runs it. Takes about two seconds."""
    uid = os.geteuid()
    install = install_line(installed())
    user = user_line(uid, gateway=_gateway(uid))
    looked_at, locked = _process_lines()
    lines = [install, user, *looked_at, swap_line(locked=locked)]
    lines += [key_line(device_key), trust_line(trust), network_line(), calibration_line()]
    mode = Mode.SERVICE if install.state == user.state == State.OK else Mode.SINGLE_USER
    return Report(
        __version__, "linux", mode, uid, all(line.state != State.BROKEN for line in lines), tuple(lines)
    )


# The installation


def installed() -> Iterator[Path]:
    """Where the programs lie that make up FlexServe: interpreter, libraries, our own package."""
    ours = find_spec("flexserve")
    assert ours is not None and ours.submodule_search_locations
    yield from map(Path, ours.submodule_search_locations)
    for name in ("stdlib", "platstdlib", "purelib", "platlib"):
        yield Path(sysconfig.get_path(name))
    yield Path(sys.executable)
    yield Path(sys.executable).resolve()


def changeable(roots: Iterable[Path], owners: frozenset[int] = frozenset({0})) -> Path | None:
    """The first file or directory at, above or below these that somebody but `owners` may change."""
    chosen = set(roots)
    for root in sorted(chosen):
        for path in (*reversed(root.parents), root):
            if _open_to_others(path, owners):
                return path
        if chosen & set(root.parents):
            continue  # walked already
        for directory, names, files in os.walk(root):
            # Python's own packages beside a virtual environment's, which does not use them.
            names[:] = [n for n in names if n not in _PACKAGES or Path(directory, n) in chosen]
            for name in (*names, *files):
                path = Path(directory) / name
                if _open_to_others(path, owners):
                    return path
    return None


def _open_to_others(path: Path, owners: frozenset[int]) -> bool:
    try:
        info = path.lstat()
    except FileNotFoundError:
        return False  # gone since it was listed
    if info.st_uid not in owners:
        return True
    if stat.S_ISLNK(info.st_mode) or (stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX):
        return False  # a link's mode says nothing; in a sticky directory nobody replaces another's files
    return bool(info.st_mode & 0o002 or (info.st_mode & 0o020 and info.st_gid != 0))


def install_line(roots: Iterable[Path], owners: frozenset[int] = frozenset({0})) -> Line:
    """Whether anybody but root may change the code that sees the secrets."""
    stops = f"{SAME_USER}, which could change the code that reads the secrets"
    path = changeable(roots, owners)
    if path is None:
        return Line("install", State.OK, "only root may change FlexServe, its libraries and Python", stops)
    info = path.lstat()
    return Line(
        "install",
        State.WEAK,
        f"{path} may be changed by user {_name(info.st_uid)} (mode {stat.S_IMODE(info.st_mode):04o})",
        stops,
        "install FlexServe as root, outside of home directories",
    )


@dataclass(frozen=True)
class Gateway:
    """Who a gateway started as root becomes, and what keeps it from becoming that."""

    name: str
    closed: Path | None


def _gateway(uid: int) -> Gateway | None:
    """None where this user cannot become another."""
    if uid != 0 or not users.may_change_user():
        return None
    account = users.gateway_account(None)
    return Gateway(account.name, users.closed_to(installed(), account.uid))


def user_line(
    uid: int, login_defs: Path = Path("/etc/login.defs"), *, gateway: Gateway | None = None
) -> Line:
    """Whether FlexServe runs as users of its own."""
    stops = "programs of the users who log in: they are another user's"
    advice = "run it as a service with a system user of its own"
    if gateway is not None and gateway.closed is None:
        found = f"started as root: the gateway becomes user {gateway.name}, the secure process another"
        return Line("user", State.OK, found, stops)
    if gateway is not None:
        found = f"the gateway stays root, since {gateway.closed} is closed to user {gateway.name}"
        advice = "install FlexServe where other users may read it, outside of home directories"
        return Line("user", State.WEAK, found, stops, advice)
    if uid == 0:
        return Line(
            "user", State.WEAK, "runs as root: a hijacked gateway would own the machine", stops, advice
        )
    if uid <= _last_system_uid(login_defs) or uid in users.DYNAMIC_USERS:
        return Line("user", State.OK, f"runs as {_name(uid)}, a system user", stops)
    found = f"runs as {_name(uid)}, who logs in and runs other programs"
    return Line("user", State.WEAK, found, stops, advice)


def _last_system_uid(login_defs: Path) -> int:
    try:
        text = login_defs.read_text()
    except OSError:
        text = ""
    found = re.search(r"^SYS_UID_MAX\s+(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 999


def _name(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return str(uid)


# The secure process


def _process_lines() -> tuple[list[Line], bool]:
    """The lines, and whether the secure process's memory is locked."""
    try:
        seen = probe()
    except FlexServeError as error:
        advice = error.hint or "run doctor as the user who runs `flexserve serve`"
        return [Line("secure_process", State.BROKEN, error.message, "", advice)], False
    return process_lines(seen), memory_locked(seen)


def memory_locked(seen: Probe) -> bool:
    """Whether the secure process says so, and the kernel that at least what is in memory is locked."""
    return seen.measures.memory_locked and seen.secure.locked_bytes >= seen.secure.resident_bytes


def process_lines(seen: Probe, kernel_has_landlock: bool | None = None) -> list[Line]:
    """What was seen of the secure process, judged. `kernel_has_landlock`: None asks this machine's."""
    look, twin = seen.secure, seen.twin
    started = f"{look.processes} processes were looked at from outside: it, and those that run chat templates"
    if kernel_has_landlock is None:
        kernel_has_landlock = landlock.version() > 0
    return [
        Line("secure_process", State.OK, started, ""),
        _secure_user(seen.user, look),
        _yes_or_no(
            "capabilities",
            not look.capabilities,
            ("it has none of root's powers", "it has capabilities"),
            "a hijacked engine that uses root's powers",
        ),
        _reach("memory", look, twin, ("mem", "maps", "environ", "auxv", "process_vm_readv")),
        _reach("ptrace", look, twin, ("ptrace",)),
        _core(look),
        _yes_or_no(
            "no_new_privs",
            look.no_new_privs,
            ("no program it starts can gain privileges", "a program it starts could gain privileges"),
            "a hijacked engine that looks for setuid programs",
        ),
        _yes_or_no(
            "seccomp",
            look.seccomp and seen.measures.file_refused,
            (
                "all its processes are filtered: no program, no connection, no file, no executable memory",
                "a process of it may make any system call"
                if not look.seccomp
                else "it could open a file, filtered or not",
            ),
            "a hijacked engine or chat template that starts programs, opens files or connects to anything",
        ),
        _landlock(seen.measures, kernel_has_landlock),
        _secret_memory(seen.measures),
        _yes_or_no(
            "descriptors",
            look.inherited_descriptor_closed,
            (
                "a descriptor left open by its parent was closed",
                "it kept a descriptor that its parent left open",
            ),
            "a hijacked engine that uses files or sockets of the gateway",
        ),
        _environment(look, twin),
        _flexmem(seen.flexmem),
    ]


def _secure_user(starter: int, look: Look) -> Line:
    stops = "a hijacked gateway that reads the device's key, which the user it runs as cannot"
    (first, *others) = look.users
    if first not in (0, starter) and not others:
        return Line("secure_user", State.OK, f"it became user {first}, who has nothing else", stops)
    if starter == 0 and users.may_change_user():
        found = f"it was started by root, and runs as {', '.join(map(str, look.users))}"
        return Line("secure_user", State.BROKEN, found, stops, "report it: this version promises it")
    found = f"it is the user of the gateway ({_name(first)}), who can read the device's key"
    return Line(
        "secure_user", State.WEAK, found, stops, "start it as root, as packaging/flexserve.service does"
    )


def _landlock(measures: Measures, kernel_has_it: bool) -> Line:
    stops = "a hijacked engine that gets around seccomp: no file, no TCP connection, no signal to others"
    if measures.landlock:
        return Line(
            "landlock", State.OK, f"used, version {measures.landlock} of the kernel's interface", stops
        )
    if kernel_has_it:
        found = "this kernel has it, and the secure process does not use it"
        return Line("landlock", State.BROKEN, found, stops, "report it: this version promises it")
    found = "this kernel does not have it, or it is off: seccomp alone refuses files and connections"
    return Line(
        "landlock", State.WEAK, found, stops, "boot a kernel with Landlock in its list of security modules"
    )


def _secret_memory(measures: Measures) -> Line:
    stops = "root's look through /proc and kernel bugs that read memory: for keys at rest, not for weights"
    if measures.secret_memory:
        return Line("memfd_secret", State.OK, "keys that are not being used are in secret memory", stops)
    found = "keys are in ordinary memory: this kernel has no memfd_secret, or RLIMIT_MEMLOCK allows none"
    return Line("memfd_secret", State.WEAK, found, stops, "boot with secretmem.enable=1 (before Linux 6.5)")


def _reach(line_id: str, look: Look, twin: Look, ways: tuple[str, ...]) -> Line:
    stops = f"{SAME_USER}: debuggers, dumpers and whatever reads /proc/PID"
    open_ways = [way for way in ways if way in look.reached]
    if open_ways:
        advice = "report it: this kernel does not honour PR_SET_DUMPABLE"
        return Line(line_id, State.BROKEN, f"possible from outside: {', '.join(open_ways)}", stops, advice)
    shown = [way for way in ways if way in twin.reached]
    proof = (
        "; without hardening it is possible"
        if len(shown) == len(ways)
        else f"; {', '.join(set(ways) - set(shown))}: this machine refuses that without our doing"
    )
    return Line(line_id, State.OK, f"refused: {', '.join(ways)}{proof}", stops)


def _core(look: Look) -> Line:
    stops = "whoever reads core files and crash reports"
    pattern = _first_line(Path("/proc/sys/kernel/core_pattern"))
    if look.dumped_core or look.core_limit_bytes != 0:
        what = (
            "a crash left a core" if look.dumped_core else f"its core limit is {look.core_limit_bytes} bytes"
        )
        return Line("core", State.BROKEN, f"{what} (core_pattern {pattern!r})", stops, "report it")
    return Line("core", State.OK, f"crashed on purpose: it left no core (core_pattern {pattern!r})", stops)


def _yes_or_no(line_id: str, holds: bool, found: tuple[str, str], stops: str) -> Line:
    if holds:
        return Line(line_id, State.OK, found[0], stops)
    return Line(line_id, State.BROKEN, found[1], stops, "report it: this version promises it")


def _environment(look: Look, twin: Look) -> Line:
    """The real one's cannot be seen; the twin is started the same way."""
    stops = "secrets and settings that slip in from the shell, such as LD_PRELOAD or API keys"
    names = look.environment if look.environment is not None else twin.environment
    if names is None:
        return Line(
            "environment", State.UNUSED, "this machine lets nobody look, so it was not checked", stops
        )
    extra = sorted(set(names) - ALLOWED_VARIABLES)
    if extra:
        return Line("environment", State.BROKEN, f"it got {', '.join(extra)}", stops, "report it")
    return Line("environment", State.OK, f"it got only {', '.join(names) or 'nothing'}", stops)


def _flexmem(flexmem: str) -> Line:
    if flexmem == "userfaultfd":
        found = "available: the model computes while it loads, and its memory can be recalled meanwhile"
        return Line("userfaultfd", State.OK, found, "")
    advice = "set vm.unprivileged_userfaultfd=1, or allow the call in the container's seccomp profile"
    return Line("userfaultfd", State.WEAK, flexmem, "", advice)


# Memory and storage


def swap_line(root: Path = Path("/"), *, locked: bool = False) -> Line:
    """Whether the kernel may write the secure process's memory to a disk in clear. `locked`: it says that it
    keeps every page in memory."""
    stops = "whoever gets the disk"
    areas = _first_lines(root / "proc" / "swaps")[1:]
    plain = [area for line in areas if (area := line.split()[0]) and not _harmless(root, area)]
    if not plain:
        found = "swap is encrypted or in memory" if areas else "there is no swap"
        return Line("swap", State.OK, found, stops)
    if locked:
        found = f"{', '.join(plain)} is never used for the secure process: its memory is locked"
        return Line("swap", State.OK, found, stops)
    if _cgroup_forbids_swap(root):
        found = f"{', '.join(plain)} is not for this cgroup (memory.swap.max 0)"
        return Line("swap", State.OK, found, stops)
    return Line(
        "swap",
        State.WEAK,
        f"{', '.join(plain)}: weights, prompts and KV may be written there in clear, nothing is locked",
        stops,
        "switch it off (swapoff), encrypt it, or run FlexServe as packaging/flexserve.service does, with "
        "MemorySwapMax=0 and LimitMEMLOCK=infinity",
    )


def _harmless(root: Path, area: str) -> bool:
    """Whether a swap area is encrypted, or compressed memory with no disk behind it."""
    block = root / "sys" / "class" / "block" / Path(os.path.realpath(area)).name
    if block.name.startswith("zram"):
        return _first_line(block / "backing_dev") in ("", "none")
    return _first_line(block / "dm" / "uuid").startswith("CRYPT-")


def _cgroup_forbids_swap(root: Path) -> bool:
    """Whether this process's cgroup (version 2), or one above it, may use no swap."""
    for line in _first_lines(root / "proc" / "self" / "cgroup"):
        number, _, path = line.split(":", 2)
        if number == "0":
            base = root / "sys" / "fs" / "cgroup"
            here = base / path.lstrip("/")
            while here != base:
                if _first_line(here / "memory.swap.max") == "0":
                    return True
                here = here.parent
    return False


def _first_line(path: Path) -> str:
    return (_first_lines(path) or [""])[0]


def _first_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


# Keys and the network


def key_line(source: str | None) -> Line:
    """Whether the device's key file is for this user only; its content is not read."""
    stops = f"{OTHER_USERS}; not {SAME_USER}, which can read what this user can"
    if source is None:
        advice = "give --device-key SOURCE to check it"
        return Line("device_key", State.UNUSED, "not checked: none was given", stops, advice)
    credential = source.startswith("credential:")
    path = Path(source)
    if credential:
        directory = os.environ.get("CREDENTIALS_DIRECTORY", "")
        path = Path(directory) / source.removeprefix("credential:")
    try:
        info = path.stat()
        check_secret_file(info, path, credential=credential)
    except OSError as error:
        return Line("device_key", State.BROKEN, f"{path}: {error.strerror}", stops, "give the right file")
    except FlexServeError as error:
        return Line("device_key", State.BROKEN, error.message, stops, error.hint)
    found = f"{path} belongs to {_name(info.st_uid)}, mode {stat.S_IMODE(info.st_mode):04o}"
    return Line("device_key", State.OK, found, stops)


def trust_line(store: TrustStore | None = None) -> Line:
    """Whether anybody else may add a trusted vendor."""
    stops = f"{OTHER_USERS}, who would have this device run their models"
    try:
        store = store or TrustStore()
        count = len(store.vendors())
    except FlexServeError as error:
        return Line("trust_store", State.BROKEN, error.message, stops, error.hint)
    found = (
        f"{count} trusted vendors in {store.directory}, where only this user and root may change something"
    )
    return Line("trust_store", State.OK, found, stops)


def network_line() -> Line:
    """There is no TLS in this version."""
    return Line(
        "tls",
        State.UNUSED,
        "there is none: the API is plain HTTP, on the loopback interface unless --host says otherwise",
        "whoever listens on the network",
        "stay on loopback, with --api-key-file where other users are not to use it",
    )


# Speed


def calibration_line() -> Line:
    """How many threads a server would start here (calibration.py)."""
    found = calibration.stored()
    if found is None:
        advice = "nothing: `flexserve serve` measures at its first start, `flexserve bench calibrate` at once"
        return Line("calibration", State.UNUSED, "this machine was not measured yet", "", advice)
    return Line("calibration", State.OK, calibration.describe(found.rates), "")
