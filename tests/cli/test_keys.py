from __future__ import annotations

import stat

from .conftest import Shell


def test_keys_come_in_pairs_and_show_no_secret(shell: Shell) -> None:
    out = shell.ok("keys vendor -o vendor.key")
    assert {p.name for p in shell.directory.iterdir()} == {"vendor.key", "vendor.pub"}
    assert stat.S_IMODE((shell.directory / "vendor.key").stat().st_mode) == 0o600
    assert "BEGIN PUBLIC KEY" in (shell.directory / "vendor.pub").read_text()
    assert "vendor.pub: public, id " in out
    assert "exists already" in shell.fails(2, "keys vendor -o vendor.key")
    assert "exists already" in shell.fails(2, "keys device -o vendor.key")


def test_trust_is_given_listed_and_taken_back(shell: Shell) -> None:
    key_id = shell.ok("keys vendor -o vendor.key").split("id ")[1].strip()
    assert shell.ok("keys trusted") == ""
    assert key_id in shell.ok("keys trust vendor.pub")
    assert shell.ok("keys trusted") == f"{key_id}\n"
    shell.ok(f"keys distrust {key_id[:12].upper()}")
    assert shell.ok("keys trusted") == ""
    shell.fails(3, f"keys distrust {key_id}")
    assert "give the .pub file" in shell.fails(6, "keys trust vendor.key")


def test_a_passphrase_comes_from_a_private_file_or_a_terminal(shell: Shell) -> None:
    secret = shell.directory / "pass"
    secret.write_text("open sesame\n")
    secret.chmod(0o600)
    shell.ok("keys device -o device.key --passphrase-file pass")
    assert '"scrypt"' in (shell.directory / "device.key").read_text()
    assert "no terminal" in shell.fails(2, "keys device -o other.key --passphrase")
    secret.chmod(0o644)
    assert "key_permissions" in shell.fails(6, "keys device -o third.key --passphrase-file pass")
    assert not (shell.directory / "third.key").exists()
