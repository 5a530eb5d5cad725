"""Classic BPF as the kernel runs it for seccomp, so that a filter of any architecture can be asked here.

Knows the five instructions our filters consist of, what the kernel checks of them (seccomp_check_filter in
kernel/seccomp.c), and the layout of `struct seccomp_data` on little-endian machines. A sixth instruction is an error:
then it belongs here first.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

LOAD_WORD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, AND, RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_MOST = 4096  # instructions
_DATA = struct.Struct("<iIQ6Q")  # struct seccomp_data: number, architecture, instruction pointer, arguments
_INSTRUCTION = struct.Struct("<HBBI")


@dataclass(frozen=True)
class Filter:
    """A program that the kernel would take."""

    instructions: tuple[tuple[int, int, int, int], ...]

    @classmethod
    def of(cls, program: bytes) -> Filter:
        """Raises `AssertionError` for what the kernel would not install."""
        assert len(program) % _INSTRUCTION.size == 0
        instructions = tuple(_INSTRUCTION.iter_unpack(program))
        assert 0 < len(instructions) <= _MOST
        for at, (code, if_true, if_false, k) in enumerate(instructions):
            if code in (JUMP_IF_EQUAL, JUMP_IF_AT_LEAST):
                assert at + 1 + max(if_true, if_false) < len(instructions), f"{at}: jumps past the end"
            elif code == LOAD_WORD:
                assert k % 4 == 0 and k + 4 <= _DATA.size, f"{at}: loads what is not there"
            else:
                assert code in (AND, RETURN), f"{at}: instruction {code:#x} is not known here"
        assert instructions[-1][0] == RETURN
        return cls(instructions)

    def decide(self, arch: int, number: int, arguments: Sequence[int] = ()) -> int:
        """What happens to a system call: an action of seccomp.py. Arguments that are not given are 0; all are
        unsigned, and `number` is too."""
        padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
        signed = number - (1 << 32) if number >= 1 << 31 else number
        data = _DATA.pack(signed, arch, 0, *padded)
        at = value = 0
        while True:
            code, if_true, if_false, k = self.instructions[at]
            at += 1
            if code == LOAD_WORD:
                value = int.from_bytes(data[k : k + 4], "little")
            elif code == AND:
                value &= k
            elif code == JUMP_IF_EQUAL:
                at += if_true if value == k else if_false
            elif code == JUMP_IF_AT_LEAST:
                at += if_true if value >= k else if_false
            else:
                return k
