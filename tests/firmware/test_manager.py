"""The Flex-Mem manager under Debian's own kernel: it gives, takes back, and yields when memory is short."""

from __future__ import annotations

import re
import time

import pytest

from flexserve.worlds.trustzone import attacks, firmware, linux
from flexserve.worlds.trustzone.machine import Machine

from .test_attacks import MISSING, NO_LINUX

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"missing {', '.join(MISSING)}: {firmware.INSTALL}"),
    pytest.mark.skipif(bool(NO_LINUX), reason=NO_LINUX),
]
PATTERN = 7
WORDS = 512
WAIT_S = attacks.ATTACK_S
STATE_WORD = 0x7EFFF010  # of the request page
EL2_CODE = 0x7F000000  # the first instruction
START = """
mkfifo /tmp/orders
manager </tmp/orders &
exec 3>/tmp/orders
"""
# One line of ours is one order for the manager; the shell's own are for the shell.
PASS_ON = """
while read -r line; do
  case "$line" in
    sh:*) eval "${line#sh:}" ;;
    *) echo "$line" >&3 ;;
  esac
done
"""


def order(machine: Machine, line: str, answer: str) -> str:
    machine.send(line)
    return machine.wait_for(answer, WAIT_S)


def pages_of(line: str) -> int:
    found = re.search(r"(\d+) pages", line)
    assert found is not None, line
    return int(found[1])


def test_pages_are_given_and_come_back_and_the_manager_leaves_nothing_behind() -> None:
    with linux.boot(linux.find(), START + PASS_ON) as machine:
        machine.wait_for("manager ready", WAIT_S)
        assert pages_of(order(machine, "give 4096", "gave ")) == 4096
        assert order(machine, f"fill {PATTERN}", "filled") == "filled, status 0"
        assert order(machine, "sum", "sum ") == f"sum {PATTERN * WORDS * 4096:#x} of 4096 pages"
        assert pages_of(order(machine, "take 1024", "took ")) == 1024
        assert order(machine, "sum", "sum ") == f"sum {PATTERN * WORDS * 3072:#x} of 3072 pages"
        assert order(machine, "stats", "flex ") == "flex 3072 claimed 0 wanted 0"
        assert pages_of(order(machine, "quit", "ending: ")) == 3072
        order(machine, "sh:sync; echo alive", "alive")


def until_protection_is(machine: Machine, state: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while order(machine, "protection", "protection ") != f"protection {state}":
        assert time.monotonic() < deadline, f"protection is never {state}"


def test_protection_goes_off_when_nothing_is_given_and_comes_back_when_the_manager_needs_it() -> None:
    with linux.boot(linux.find(), START + PASS_ON) as machine:
        machine.wait_for("manager ready", WAIT_S)
        assert order(machine, "window 300", "window,") == "window, status 0"
        until_protection_is(machine, "off")
        assert pages_of(order(machine, "give 512", "gave ")) == 512
        assert order(machine, f"fill {PATTERN}", "filled") == "filled, status 0"
        order(machine, "sh:usleep 2000000; echo waited", "waited")
        assert order(machine, "protection", "protection ") == "protection on", "pages are given"
        assert order(machine, "sum", "sum ") == f"sum {PATTERN * WORDS * 512:#x} of 512 pages"
        assert pages_of(order(machine, "take 512", "took ")) == 512
        until_protection_is(machine, "off")
        # Whatever the page says: a store to the trap page is SIGBUS now, and the manager asks again.
        order(machine, f"sh:devmem {STATE_WORD:#x} 64 1; echo lied", "lied")
        assert pages_of(order(machine, "give 512", "gave ")) == 512
        assert pages_of(order(machine, "quit", "ending: ")) == 512


def test_protection_goes_off_and_comes_on_with_cpus_that_come_and_go() -> None:
    cpu1 = "/sys/devices/system/cpu/cpu1/online"
    with linux.boot(linux.find(), START + PASS_ON) as machine:
        machine.wait_for("manager ready", WAIT_S)
        order(machine, "window 300", "window, status 0")
        until_protection_is(machine, "off")
        for online in (0, 1):
            order(machine, f"sh:echo {online} >{cpu1}; echo switched", "switched")
            assert pages_of(order(machine, "give 512", "gave ")) == 512
            order(machine, f"sh:echo {1 - online} >{cpu1}; echo back", "back")
            assert order(machine, "stats", "flex ") == "flex 512 claimed 0 wanted 0"
            assert pages_of(order(machine, "take 512", "took ")) == 512
            until_protection_is(machine, "off")
        assert pages_of(order(machine, "quit", "ending: ")) == 0


def test_an_el2_that_linuxs_root_changed_while_protection_was_off_is_refused_until_it_is_as_before() -> None:
    with linux.boot(linux.find(), START + PASS_ON) as machine:
        machine.wait_for("manager ready", WAIT_S)
        order(machine, "window 300", "window, status 0")
        until_protection_is(machine, "off")
        before = order(machine, f"sh:devmem {EL2_CODE:#x} 32", "0x")
        order(machine, f"sh:devmem {EL2_CODE:#x} 32 0; echo changed", "changed")
        refused = "refused: EL2 was tampered with, protection stays off"
        assert order(machine, "give 512", "refused") == refused
        assert order(machine, "protection", "protection ") == "protection tampered"
        order(machine, f"sh:devmem {EL2_CODE:#x} 32 {before}; echo restored", "restored")
        assert pages_of(order(machine, "give 512", "gave ")) == 512
        assert pages_of(order(machine, "quit", "ending: ")) == 512


def test_when_memory_is_short_the_manager_takes_back_and_nobody_is_killed() -> None:
    hog = "sh:mkdir /hog; mount -t tmpfs -o size=95% hog /hog; i=0; while [ $i -lt 130 ]; do "
    hog += "dd if=/dev/zero of=/hog/$i bs=1M count=5 2>/dev/null || break; i=$((i+1)); usleep 200000; done; "
    hog += "echo hog $i"
    with linux.boot(linux.find(), START + PASS_ON) as machine:
        machine.wait_for("manager ready", WAIT_S)
        assert pages_of(order(machine, "give 98304", "gave ")) == 98304
        order(machine, f"fill {PATTERN}", "filled, status 0")
        machine.send(hog)
        taken, line = 0, ""
        while not line.startswith("hog "):
            line = machine.line(WAIT_S)
            taken += pages_of(line) if line.startswith(("pressure", "short")) else 0
        assert line == "hog 130", "650 MB were there for the taking, of which 384 MB had been given away"
        left = 98304 - taken
        assert 0 < left < 98304
        assert order(machine, "sum", "sum ") == f"sum {PATTERN * WORDS * left:#x} of {left} pages"
        order(machine, "quit", "ending: ")
