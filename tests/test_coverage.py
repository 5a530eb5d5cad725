"""docs/coverage.md says what the tests show, and every architecture of llama.cpp is in one place there."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp

from flexserve.sealed.model_rules import NOT_REVIEWED, REFUSED, REVIEWED

from .coverage import NOT_SHOWN, PAGE, markdown


def test_the_page_is_what_the_tests_are_made_of() -> None:
    assert PAGE.read_text() == markdown(), "run `python -m tests.coverage`"


def architectures_of_llama_cpp() -> set[str]:
    lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libllama.so"))
    name = lib["_Z13llm_arch_name8llm_arch"]
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.c_int]
    names = {name(number).decode() for number in range(1000)}
    return names - {"unknown", "(unknown)"}


def test_every_architecture_is_reviewed_or_not_or_refused_with_a_reason() -> None:
    known = architectures_of_llama_cpp()
    assert len(known) > 100
    assert known == REVIEWED | NOT_REVIEWED | REFUSED.keys()
    assert not REVIEWED & NOT_REVIEWED
    assert not REFUSED.keys() & (REVIEWED | NOT_REVIEWED)
    assert NOT_SHOWN.keys() < NOT_REVIEWED
