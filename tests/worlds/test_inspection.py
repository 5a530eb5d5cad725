"""What /proc and strace say of a secure process that serves, against what `flexserve doctor` prints.

Each of doctor's lines about it has a fact here that was found another way. A twin without hardening shows that the
looks see something.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flexserve.core import Finished, Request, Sampling
from flexserve.worlds.base import ModelSource
from flexserve.worlds.linux import LinuxWorld, doctor, users
from flexserve.worlds.linux.doctor import ALLOWED_VARIABLES, State
from flexserve.worlds.linux.probe import Probe, family, probe

from ..attacker import needs_injection
from ..world_fixtures import Device, linux_world
from .kernel_tables import kernel_table
from .test_filters import PLAIN, WITH_CHECKS

pytestmark = pytest.mark.skipif(
    not users.may_change_user(), reason="only root sees the descriptors and maps of a hardened process"
)
NOT_IN_PROC = {
    "landlock"
}  # the kernel shows nobody who is restricted by it: test_hardening.py asks such a process


@pytest.fixture(scope="module")
def world(device: Device, source: ModelSource) -> Iterator[LinuxWorld]:
    with linux_world(device) as started:
        started.register(source)
        answer(started)
        yield started


@pytest.fixture(scope="module")
def twin(device: Device, source: ModelSource) -> Iterator[LinuxWorld]:
    with linux_world(device, hardened=False) as started:
        started.register(source)
        answer(started)
        yield started


@pytest.fixture(scope="module")
def seen() -> Probe:
    return probe()


def answer(world: LinuxWorld) -> tuple[int, ...]:
    asked = Request(
        id="r",
        model="m",
        token_ids=(1, 2, 3),
        max_tokens=8,
        ignore_eos=True,
        sampling=Sampling(temperature=0),
    )
    *_, last = world.generate(asked)
    assert isinstance(last, Finished)
    return last.token_ids


# Facts of one process


def every_thread(pid: int) -> list[dict[str, str]]:
    texts = [(task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return [dict(re.findall(r"(\w+):[ \t]*(.*)", text)) for text in texts]


def is_out_of_reach(pid: int) -> bool:
    """What the kernel guards by ptrace's rules belongs to root where the process is not dumpable (proc(5))."""
    (uid,) = set(users.status(pid)["Uid"].split())
    files = [Path(f"/proc/{pid}/{name}").stat() for name in ("mem", "maps", "environ", "auxv")]
    return all(file.st_uid == 0 != int(uid) for file in files)


def leaves_no_core(pid: int) -> bool:
    return re.search(r"Max core file size +0 +0 ", Path(f"/proc/{pid}/limits").read_text()) is not None


def has_no_power(pid: int) -> bool:
    names = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    return all(int(thread[name], 16) == 0 for thread in every_thread(pid) for name in names)


def is_a_user_of_its_own(pid: int) -> bool:
    status = users.status(pid)
    (uid,) = set(status["Uid"].split()) | set(status["Gid"].split())
    return int(uid) in users.DYNAMIC_USERS and status["Groups"] == ""


def is_filtered(pid: int) -> bool:
    """By more filters than those it was started with."""
    before = int(users.status("self")["Seccomp_filters"])
    threads = every_thread(pid)
    return all(thread["Seccomp"] == "2" and int(thread["Seccomp_filters"]) > before for thread in threads)


def gains_nothing(pid: int) -> bool:
    return all(thread["NoNewPrivs"] == "1" for thread in every_thread(pid))


def holds_nothing_of_others(pid: int) -> bool:
    targets = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    kinds = {re.sub(r":\[\d+\]", "", target) for target in targets}
    own = {"/dev/null", "socket", "pipe", "anon_inode:[userfaultfd]"}
    # The sealed model; and a zygote tells its children how large it is.
    return not [kind for kind in kinds - own if not re.search(r"\.flex$|^/proc/\d+/statm$", kind)]


def has_a_clean_environment(pid: int) -> bool:
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return {entry.split(b"=")[0].decode() for entry in entries if entry} <= ALLOWED_VARIABLES


def mappings(pid: int) -> list[tuple[str, str, set[str]]]:
    """Permissions, name and VmFlags of each."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    found = re.findall(
        r"^[0-9a-f]+-[0-9a-f]+ (\S+) \S+ \S+ \S+ *(.*)$(?:\n\w+: .*)*?\nVmFlags: (.*)$", text, re.M
    )
    return [(permissions, name, set(flags.split())) for permissions, name, flags in found]


def keeps_keys_in_secret_memory(pid: int) -> bool:
    return any(name.startswith("/secretmem") for _, name, _ in mappings(pid))


def computes_while_it_loads(pid: int) -> bool:
    """Its weights' memory is registered for missing pages."""
    return any("um" in flags for _, _, flags in mappings(pid))


def locks_its_memory(pid: int) -> bool:
    return all("lo" in flags for permissions, name, flags in mappings(pid) if name == "[heap]")


FACTS: dict[str, Callable[[int], bool]] = {
    "secure_process": lambda pid: users.status(pid)["State"][0] in "SRD",
    "secure_user": is_a_user_of_its_own,
    "capabilities": has_no_power,
    "memory": is_out_of_reach,
    "ptrace": is_out_of_reach,
    "core": leaves_no_core,
    "no_new_privs": gains_nothing,
    "seccomp": is_filtered,
    "descriptors": holds_nothing_of_others,
    "environment": has_a_clean_environment,
}
# Of the first of its processes: the others have neither keys nor weights.
FACTS_OF_THE_FIRST: dict[str, Callable[[int], bool]] = {
    "memfd_secret": keeps_keys_in_secret_memory,
    "userfaultfd": computes_while_it_loads,
}


def test_every_line_of_doctors_about_it_has_a_fact(seen: Probe) -> None:
    lines = {line.id for line in doctor.process_lines(seen)}
    assert lines == {*FACTS, *FACTS_OF_THE_FIRST, *NOT_IN_PROC}


@pytest.mark.parametrize("line_id", [*FACTS, *FACTS_OF_THE_FIRST])
def test_proc_confirms_what_doctor_says(world: LinuxWorld, seen: Probe, line_id: str) -> None:
    assert world.pid is not None
    (line,) = (line for line in doctor.process_lines(seen) if line.id == line_id)
    if line_id in FACTS:
        facts = {FACTS[line_id](pid) for pid in family(world.pid)}
    else:
        facts = {FACTS_OF_THE_FIRST[line_id](world.pid)}
    assert facts == {line.state == State.OK}, line


@pytest.mark.parametrize(
    "line_id", ["secure_user", "capabilities", "memory", "core", "no_new_privs", "seccomp", "memfd_secret"]
)
def test_control_of_its_twin_without_hardening_they_are_not_true(twin: LinuxWorld, line_id: str) -> None:
    assert twin.pid is not None
    assert not {**FACTS, **FACTS_OF_THE_FIRST}[line_id](twin.pid)


def test_the_first_process_has_both_its_filters(world: LinuxWorld) -> None:
    assert world.pid is not None
    before = int(users.status("self")["Seccomp_filters"])
    assert {int(thread["Seccomp_filters"]) - before for thread in every_thread(world.pid)} == {2}


def test_memory_is_locked_where_the_process_says_so(world: LinuxWorld, seen: Probe) -> None:
    assert world.pid is not None
    assert locks_its_memory(world.pid) == seen.measures.memory_locked == doctor.memory_locked(seen)


def test_no_memory_is_writable_and_executable_and_no_key_file_or_model_is_mapped(
    world: LinuxWorld, device: Device
) -> None:
    assert world.pid is not None
    for pid in family(world.pid):
        for permissions, name, _ in mappings(pid):
            assert not {"w", "x"} <= set(permissions), name
            assert not {"s", "x"} <= set(permissions) or not any(
                {"s", "w"} <= set(other) and name == same for other, same, _ in mappings(pid)
            ), f"{name} may be written under another address"
            assert not name.startswith(str(device.directory)), name


def test_weights_and_keys_are_left_out_of_every_dump(world: LinuxWorld) -> None:
    assert world.pid is not None
    marked = [
        flags for _, name, flags in mappings(world.pid) if "um" in flags or name.startswith("/secretmem")
    ]
    assert marked and all("dd" in flags or "io" in flags for flags in marked)


# strace


@needs_injection
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_strace_of_an_answer_shows_only_calls_that_the_filter_allows(
    world: LinuxWorld, tmp_path: Path
) -> None:
    assert world.pid is not None
    before, out = answer(world), tmp_path / "calls"
    processes = family(world.pid)
    words = ["strace", "-f", "-o", str(out), *(word for pid in processes for word in ("-p", str(pid)))]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        for _ in processes:
            assert "attached" in strace.stderr.readline()
        after = answer(world)
        strace.send_signal(signal.SIGINT)
    assert after == before
    made: dict[str, set[str]] = {}
    numbers = {value: name for name, value in kernel_table("x86_64").items()} | {
        451: "cachestat",
        452: "fchmodat2",
    }
    for name, result in re.findall(
        r"^\d+ +(?:<\.\.\. )?(\w+)[( ].*?(?:= (-?\w+ ?\w*).*)?$", out.read_text(), re.M
    ):
        number = re.fullmatch(r"syscall_(0x[0-9a-f]+)", name)
        made.setdefault(numbers[int(number[1], 16)] if number else name, set()).add(result)
    assert {"futex", "sendto"} <= made.keys(), "it saw the answer being made"
    for name in made.keys() - {*PLAIN["secure"], *WITH_CHECKS}:
        assert made[name] <= {"-1 EPERM", "-1 EACCES", "-1 ENOSYS", ""}, f"{name}: {made[name]}"
    assert made.keys().isdisjoint({"socket", "connect", "execve", "ptrace", "unlink", "rename"})
