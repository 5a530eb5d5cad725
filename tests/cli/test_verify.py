from __future__ import annotations

from pathlib import Path

from .conftest import Shell
from .test_inspect import validator

LINE = "verify m.flex --license m.lic --device-key device.key --vendor-pub vendor.pub"


def damage(shell: Shell, offset: int) -> None:
    path = shell.directory / "m.flex"
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_an_authentic_model_passes_with_and_without_key(sealed: Shell) -> None:
    assert "authentic. demo version 3" in sealed.ok(LINE)
    assert "no key given" in sealed.ok("verify m.flex --vendor-pub vendor.pub")
    for line, checked in ((LINE, "hashes_and_tags"), ("verify m.flex --vendor-pub vendor.pub", "hashes")):
        report = sealed.json(f"{line} --json")
        validator("verify").validate(report)
        assert (report["authentic"], report["checked"], report["bad_segments"]) == (True, checked, [])


def test_a_bad_segment_is_named_on_stdout_and_ends_in_exit_code_4(sealed: Shell) -> None:
    damage(sealed, -1)
    result = sealed(f"{LINE} --json")
    assert result.exit_code == 4
    assert "segment_not_authentic" in result.stderr
    report = sealed.json(f"{LINE} --json")
    validator("verify").validate(report)
    assert not report["authentic"]
    assert [bad["tensors"] for bad in report["bad_segments"]] != [[]]
    text = sealed(LINE)
    assert "wrong hash" in text.stdout
    assert "1 of 4 segments" in text.stderr


def test_each_refusal_has_the_exit_code_of_its_family(sealed: Shell, tiny_gguf: Path) -> None:
    sealed.ok("keys device -o other.key")
    sealed.ok("keys vendor -o stranger.key")
    sealed.ok("seal -o other.flex --vendor vendor.key", tiny_gguf)
    for code, name, line in (
        (2, "go together", "verify m.flex --license m.lic --vendor-pub vendor.pub"),
        (3, "not_found", LINE.replace("m.flex", "none.flex")),
        (3, "not_found", LINE.replace("m.lic", "none.lic")),
        (3, "not_found", LINE.replace("device.key", "none.key")),
        (4, "vendor_not_trusted", LINE.replace("vendor.pub", "stranger.pub")),
        (4, "vendor_not_trusted", LINE.replace(" --vendor-pub vendor.pub", "")),
        (4, "sealed_malformed", LINE.replace("m.flex", "m.lic")),
        (5, "licence_malformed", LINE.replace("m.lic", "vendor.pub")),
        (5, "licence_wrong_device", LINE.replace("device.key", "other.key")),
        (5, "licence_wrong_model", LINE.replace("m.flex", "other.flex")),
        (6, "key_malformed", LINE.replace("device.key", "vendor.key")),
        (6, "key_malformed", LINE.replace("vendor.pub", "m.lic")),
    ):
        assert name in sealed.fails(code, line)


def test_an_old_licence_is_refused_once_a_newer_one_was_used(sealed: Shell) -> None:
    for name, serial in (("old", 10), ("new", 11)):
        sealed.ok(f"license m.flex --vendor vendor.key --device device.pub -o {name}.lic --serial {serial}")
    sealed.ok(LINE.replace("m.lic", "old.lic"))
    sealed.ok(LINE.replace("m.lic", "new.lic"))
    assert "rolled_back" in sealed.fails(5, LINE.replace("m.lic", "old.lic"))


def test_a_state_file_somebody_changed_is_refused(sealed: Shell) -> None:
    sealed.ok(LINE)
    (state,) = (sealed.directory.parent / "state" / "flexserve").glob("*.state")
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    assert "state_not_authentic" in sealed.fails(8, LINE)


def test_a_key_that_others_can_read_is_refused(sealed: Shell) -> None:
    (sealed.directory / "device.key").chmod(0o644)
    assert "key_permissions" in sealed.fails(6, LINE)
