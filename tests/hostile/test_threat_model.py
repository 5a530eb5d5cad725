"""docs/threat-model.md promises nothing without a test: every test it names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "threat-model.md").read_text()
ROWS = [line for line in TEXT.splitlines() if re.match(r"\| \d+ \|", line)]


def test_every_guarantee_has_a_number_a_column_for_each_world_and_a_test() -> None:
    for number, row in enumerate(ROWS, 1):
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 7, row
        assert cells[0] == str(number)
        assert all(cells)
        assert re.fullmatch(r"`[^`]+::test_\w+`(, `[^`]+::test_\w+`)*", cells[6].strip()), row


def test_every_test_it_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", TEXT)
    assert len(named) >= len(ROWS) > 10
    for path, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{name}"
