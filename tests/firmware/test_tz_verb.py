"""`flexserve tz attack`: its table, its JSON, its errors. The attacks themselves: test_attacks.py."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from tests.schemas import validate

from flexserve.cli import tz
from flexserve.errors import NotFound
from flexserve.worlds.trustzone import attacks, firmware
from flexserve.worlds.trustzone.attacks import Row, Seen

ATTACK = attacks.attacks(["el2-tables"])[0]
BLOCKED = Row(ATTACK, Seen(False, "fault (0x96000021)"), Seen(True, "the canary (0x1)"))
OPEN = Row(ATTACK, Seen(True, "the canary (0x1)"), Seen(True, "the canary (0x1)"))
NO_CONTROL = Row(ATTACK, Seen(False, "fault"), Seen(False, "fault"))
HUNG = Row(ATTACK, Seen(None, "silent"), Seen(True, "the canary"))


def test_the_list_names_every_attack_and_runs_none() -> None:
    done = CliRunner().invoke(tz.command, ["attack", "--list"])
    assert done.exit_code == 0
    assert all(attack.id in done.output for attack in attacks.attacks())


def test_an_unknown_attack_is_named() -> None:
    with pytest.raises(NotFound, match="no attack sing"):
        attacks.attacks(["flex-read", "sing"])


@pytest.mark.parametrize(
    ("row", "says"),
    [(BLOCKED, "blocked "), (OPEN, "NOT BLOCKED"), (NO_CONTROL, "NO CONTROL"), (HUNG, "NOT BLOCKED")],
)
def test_a_row_says_what_was_tried_expected_and_seen(row: Row, says: str) -> None:
    text = tz.line(row.as_dict())
    assert text.startswith(says)
    for part in (
        ATTACK.tried,
        ATTACK.expected,
        row.with_defence.text,
        row.without_defence.text,
        "layers off",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("rows", "code"), [([BLOCKED], 0), ([BLOCKED, OPEN], 1), ([NO_CONTROL], 1), ([HUNG], 1)]
)
def test_the_exit_code_tells_whether_all_held(
    rows: list[Row], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attacks, "run", lambda *_: rows)
    monkeypatch.setattr(attacks, "qemu_version", lambda: "0")
    done = CliRunner().invoke(tz.command, ["attack", "--json"])
    assert done.exit_code == code
    validate("tz-attack", attacks.summary(rows))


def test_missing_tools_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(NotFound, match="qemu-system-aarch64") as caught:
        firmware.build()
    assert "apt-get install" in caught.value.hint
