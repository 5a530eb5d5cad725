"""docs/threat-model.md promises nothing without a test: all it names are there, and what it lists is what there is."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "threat-model.md").read_text()
ROWS = [line for line in TEXT.splitlines() if re.match(r"\| \d+ \|", line)]
NAMED = re.findall(r"`(tests/[^`:]+)::([^`]+)`", TEXT)
ONE_OR_MORE_TESTS = r"`[^`]+::test_\w+`(, `[^`]+::test_\w+`)*"
UNIT = ROOT / "packaging" / "flexserve.service"
RUNS = {"Type", "ExecStart", "Environment", "Restart", "KillMode"}  # how it runs, not what it is kept from


def section(title: str) -> str:
    _, _, after = TEXT.partition(f"\n## {title}\n")
    assert after, title
    return after.partition("\n## ")[0]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split(" | ")]


@functools.cache
def functions_of(path: str) -> dict[str, list[str]]:
    """The functions that pytest would collect from a file, each with its decorators."""
    tree = ast.parse((ROOT / path).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name: [ast.unparse(d) for d in node.decorator_list] for node in functions}


def test_every_guarantee_has_a_number_a_column_for_each_world_and_a_test() -> None:
    for number, row in enumerate(ROWS, 1):
        row_cells = cells(row)
        assert len(row_cells) == 7, row
        assert row_cells[0] == str(number)
        assert all(row_cells)
        assert re.fullmatch(ONE_OR_MORE_TESTS, row_cells[6]), row


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED)))
def test_a_test_it_names_exists_and_is_run(path: str, name: str) -> None:
    assert re.fullmatch(r"tests/(\w+/)*test_\w+\.py", path)
    found = functions_of(path)
    assert name in found, f"{path} has no {name}"
    assert not [d for d in found[name] if re.match(r"pytest\.mark\.(skip|xfail)\b", d)], "switched off"


def test_it_names_many_and_no_other_way() -> None:
    assert len(NAMED) >= len(ROWS) > 10
    assert len(NAMED) == TEXT.count("::"), "each in the form that the test above finds"


def test_every_file_it_names_exists() -> None:
    named = set(re.findall(r"`((?:packaging|docs|src)/[\w./-]+)`", TEXT)) | {
        f"docs/{link}" for link in re.findall(r"\]\(([\w-]+\.md)\)", TEXT)
    }
    assert UNIT.relative_to(ROOT).as_posix() in named
    assert not [path for path in named if not (ROOT / path).exists()]
    for name in re.findall(r"`(\w+\.py)`", TEXT):
        assert list((ROOT / "src").rglob(name)), name


# Doctor


def test_every_line_of_doctors_is_there_with_its_guarantees_and_a_test() -> None:
    schema = json.loads((ROOT / "docs" / "schemas" / "doctor.json").read_text())
    ids = schema["properties"]["lines"]["items"]["properties"]["id"]["enum"]
    rows = [cells(line) for line in section("What doctor's lines are worth").splitlines() if "::" in line]
    assert [name.strip("`") for name, *_ in rows] == ids
    for name, guarantees, tests in rows:
        assert re.fullmatch(ONE_OR_MORE_TESTS, tests), name
        assert guarantees == "-" or {int(g) for g in guarantees.split(", ")} <= set(range(1, len(ROWS) + 1))


# The unit


def settings() -> list[str]:
    """The unit's lines, but for those that only say how it runs."""
    _, _, service = UNIT.read_text().partition("[Service]\n")
    lines = re.findall(r"^\w+=.*$", service.partition("\n[Install]")[0], re.MULTILINE)
    return [line for line in lines if line.partition("=")[0] not in RUNS]


def test_what_the_unit_adds_is_every_line_of_the_unit_and_no_other() -> None:
    listed = re.findall(r"`(\w+=[^`]*)`", section("What the unit adds"))
    assert sorted(listed) == sorted(settings())
    assert len(listed) > 25


def test_what_doctor_and_the_documents_say_of_the_unit_is_in_it() -> None:
    doctor = (ROOT / "src" / "flexserve" / "worlds" / "linux" / "doctor.py").read_text()
    said = set(re.findall(r"\b((?:Memory|Limit)\w+=\w+)", doctor))
    assert said == {"MemorySwapMax=0", "LimitMEMLOCK=infinity"}
    said |= set(re.findall(r"\b((?:Memory|Limit|Protect|Private|Restrict)\w+=\w+)", TEXT))
    assert not [one for one in said if not any(f"{line} ".startswith(f"{one} ") for line in settings())]
    start = re.search(r"^ExecStart=.*$", UNIT.read_text(), re.MULTILINE)
    assert start is not None
    for word in ("--user flexserve", "--device-key credential:device.key", "--admin-socket /run/flexserve/"):
        assert word in start[0]
