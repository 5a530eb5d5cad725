"""Doctor's lines about the secure process, each with its measure really taken away.

In a copy of the package a line of the hardening is cut, and the real probe looks at what starts then.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from flexserve.worlds.linux import landlock, users
from flexserve.worlds.linux.channel import Measures
from flexserve.worlds.linux.doctor import State, process_lines
from flexserve.worlds.linux.probe import Look, Probe

from ..attacker import needs_tracing
from .test_two_users import ROOT, SITES

LINUX = "worlds/linux"
HIDE = '_prctl(_PR_SET_DUMPABLE, 0, "PR_SET_DUMPABLE")'
GAIN_NOTHING = "_prctl(_PR_SET_NO_NEW_PRIVS, 1, "
INSTALL = "    buffer = ctypes.create_string_buffer(instructions"


@dataclass(frozen=True)
class Cut:
    """Text of one file that is replaced wherever it stands in it."""

    file: str
    text: str
    instead: str = "pass"


NOT_FILTERED = Cut(f"{LINUX}/seccomp.py", INSTALL, f"    return\n{INSTALL}")
NO_LANDLOCK = Cut(f"{LINUX}/hardening.py", "landlock.restrict(version)", "version = 0")
SAME_USER = Cut(f"{LINUX}/hardening.py", "users.become(user, user)")

# What is cut, and the lines that are broken then; the others stay as they are.
CUTS: dict[str, tuple[tuple[Cut, ...], set[str]]] = {
    "it does not start": (
        (Cut(f"{LINUX}/launch.py", "\nmain()\n", "\nsys.exit(3)\n"),),
        {"secure_process"},
    ),
    "it stays dumpable": (
        (
            Cut(f"{LINUX}/launch.py", "ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)"),
            Cut(f"{LINUX}/hardening.py", HIDE),
        ),
        {"memory", "ptrace"},
    ),
    "cores are not limited": (
        (
            Cut(f"{LINUX}/launch.py", "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))"),
            Cut(f"{LINUX}/hardening.py", "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))"),
        ),
        {"core"},
    ),
    "it is not filtered": ((NOT_FILTERED,), {"seccomp"}),
    "it keeps the filter it was born with": (
        (Cut(f"{LINUX}/hardening.py", "seccomp.install(syscalls.secure(os.getpid()))"),),
        {"seccomp"},
    ),
    "Landlock is not used": ((NO_LANDLOCK,), {"landlock"}),
    "it may gain privileges": (
        (
            Cut(f"{LINUX}/hardening.py", GAIN_NOTHING, "print("),
            Cut(f"{LINUX}/seccomp.py", "_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)"),
            NOT_FILTERED,
            NO_LANDLOCK,
        ),
        {"no_new_privs", "seccomp", "landlock"},
    ),
    "descriptors stay open": (
        (Cut(f"{LINUX}/__main__.py", "    close_other_descriptors(fd)", "    pass"),),
        {"descriptors"},
    ),
    "it inherits the environment": (
        (Cut(f"{LINUX}/process.py", "environment = {", 'environment = {"LD_PRELOAD": "", '),),
        {"environment"},
    ),
}
AS_ROOT: dict[str, tuple[tuple[Cut, ...], set[str]]] = {
    "it stays root": ((SAME_USER,), {"secure_user", "capabilities"}),
}
WEAKENED: dict[str, tuple[tuple[Cut, ...], set[str]]] = {
    "keys are in ordinary memory": (
        (Cut("sealed/secret.py", "fd = -1 if self.ordinary else", "fd = -1 if True else"),),
        {"memfd_secret"},
    ),
    "userfaultfd is refused": ((Cut(f"{LINUX}/syscalls.py", '"userfaultfd",', ""),), {"userfaultfd"}),
}
ALL = {**CUTS, **AS_ROOT, **WEAKENED}


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A virtual environment that finds the package in `src` beside it."""
    made = tmp_path_factory.mktemp("cut")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made / "venv")], check=True)
    (site,) = made.glob("venv/lib/*/site-packages")
    (site / "flexserve.pth").write_text("\n".join([str(made / "src"), *SITES]) + "\n")
    yield made
    shutil.rmtree(made)


def look(installation: Path, cuts: tuple[Cut, ...], as_whom: Callable[[], None] | None) -> Probe | None:
    """What the probe sees of the package without these; None: nothing, it does not start."""
    source = installation / "src"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "src" / "flexserve", source / "flexserve")
    for cut in cuts:
        path = source / "flexserve" / cut.file
        text = path.read_text()
        assert cut.text in text, f"{cut.file} does not have it any more: {cut.text}"
        path.write_text(text.replace(cut.text, cut.instead))
    words = [str(installation / "venv" / "bin" / "python"), "-I", "-B", "-m", "flexserve.worlds.linux.probe"]
    done = subprocess.run(
        words, capture_output=True, timeout=120, check=False, preexec_fn=as_whom
    )  # fmt: skip
    if done.returncode:
        assert b"EngineFailure" in done.stderr, done.stderr.decode()
        return None
    return msgspec.json.decode(done.stdout, type=Probe)


def without_privileges() -> None:
    """As FlexServe runs in a home directory, whoever runs the tests."""
    users.drop_bounding_set()
    users.drop_capabilities()


def states(seen: Probe | None) -> dict[str, State]:
    if seen is None:
        return {"secure_process": State.BROKEN}
    return {line.id: line.state for line in process_lines(seen)}


@pytest.fixture(scope="module")
def whole(installation: Path) -> dict[str, State]:
    """Nothing cut."""
    return states(look(installation, (), without_privileges))


def changed(before: dict[str, State], after: dict[str, State]) -> dict[str, State]:
    return {line: state for line, state in after.items() if state != before[line]}


@pytest.mark.slow
@needs_tracing
@pytest.mark.parametrize("name", sorted(CUTS))
def test_without_its_measure_a_line_is_broken(installation: Path, whole: dict[str, State], name: str) -> None:
    cuts, lines = CUTS[name]
    if "core" in lines and resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        pytest.skip("this user may not have core files at all")
    expected = lines - (set() if landlock.version() else {"landlock"})
    if not expected:
        pytest.skip("this kernel has no Landlock")
    if "no_new_privs" in lines and users.status("self")["NoNewPrivs"] == "1":
        pytest.skip("the tests themselves run without new privileges, and so does what they start")
    found = changed(whole, states(look(installation, cuts, without_privileges)))
    assert found == dict.fromkeys(expected, State.BROKEN)


@pytest.mark.slow
@pytest.mark.skipif(not users.may_change_user(), reason="only root can become another user, or fail to")
@pytest.mark.parametrize("name", sorted(AS_ROOT))
def test_without_its_measure_a_line_is_broken_where_root_starts_it(installation: Path, name: str) -> None:
    cuts, lines = AS_ROOT[name]
    found = states(look(installation, cuts, None))
    assert {line for line, state in found.items() if state == State.BROKEN} >= lines


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WEAKENED))
def test_without_its_measure_a_line_is_weak(installation: Path, whole: dict[str, State], name: str) -> None:
    cuts, (line,) = WEAKENED[name]
    if whole[line] == State.WEAK:
        pytest.skip(f"{line} is weak on this machine anyway")
    assert changed(whole, states(look(installation, cuts, without_privileges))) == {line: State.WEAK}


def fine() -> Probe:
    """As one that kept every promise looks."""
    look = Look(
        processes=3,
        users=(1,),
        capabilities=False,
        reached=(),
        no_new_privs=True,
        seccomp=True,
        core_limit_bytes=0,
        locked_bytes=0,
        resident_bytes=0,
        environment=(),
        inherited_descriptor_closed=True,
        dumped_core=False,
    )
    return Probe(1, "userfaultfd", Measures(), look, look)


def test_every_line_about_the_secure_process_has_its_measure_cut() -> None:
    cut = {line for _, lines in ALL.values() for line in lines}
    assert cut == {line.id for line in process_lines(fine())}


def test_what_is_cut_is_still_there_to_be_cut() -> None:
    for cuts, _ in ALL.values():
        for cut in cuts:
            assert cut.text in (ROOT / "src" / "flexserve" / cut.file).read_text(), cut
