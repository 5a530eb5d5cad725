from __future__ import annotations

from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexserve.cli.license import parse_expiry
from flexserve.errors import Usage
from flexserve.sealed.licence import Licence, utc

from .conftest import Shell


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2027-12-31", "2027-12-31T23:59:59Z"),
        ("20271231", "2027-12-31T23:59:59Z"),
        ("2028-02-29", "2028-02-29T23:59:59Z"),
        ("2027-12-31T12:00", "2027-12-31T12:00:00Z"),
        ("2027-12-31T12:00:00Z", "2027-12-31T12:00:00Z"),
        ("2027-12-31T12:00:00+02:00", "2027-12-31T10:00:00Z"),
        ("9999-12-31", "9999-12-31T23:59:59Z"),
    ],
)
def test_a_date_means_the_end_of_that_day_and_a_moment_itself(text: str, moment: str) -> None:
    assert utc(parse_expiry(text)) == moment


@given(st.dates(min_value=date(1970, 1, 1)))
def test_every_day_has_an_end(day: date) -> None:
    assert utc(parse_expiry(str(day))) == f"{day}T23:59:59Z"


@pytest.mark.parametrize(
    "text", ["", "tomorrow", "2027-13-01", "2027-02-30", "1969-12-31", "0001-01-01", "12:00"]
)
def test_other_text_is_no_date(text: str) -> None:
    with pytest.raises(Usage, match="--expires"):
        parse_expiry(text)


def licence(shell: Shell) -> Licence:
    return Licence.parse((shell.directory / "m.lic").read_bytes())


def test_a_later_licence_has_a_larger_serial_and_the_serial_can_be_chosen(sealed: Shell) -> None:
    first = licence(sealed)
    sealed.ok("license m.flex --vendor vendor.key --device device.pub -o m.lic --expires 2030-01-01")
    assert licence(sealed).serial > first.serial
    assert utc(licence(sealed).expires_at) == "2030-01-01T23:59:59Z"
    sealed.ok("license m.flex --vendor vendor.key --device device.pub -o m.lic --serial 5")
    assert licence(sealed).serial == 5


def test_bad_calls_have_their_own_exit_codes_and_change_nothing(sealed: Shell) -> None:
    before = (sealed.directory / "m.lic").read_bytes()
    line = "license m.flex --vendor vendor.key --device device.pub -o m.lic"
    sealed.fails(2, f"{line} --expires soon")
    sealed.fails(2, f"{line} --serial 0")
    sealed.fails(6, line.replace("device.pub", "device.key"))
    sealed.fails(6, line.replace("vendor.key", "device.key"))
    sealed.fails(3, line.replace("m.flex", "none.flex"))
    sealed.fails(2, line.replace("-o m.lic", "-o m.flex"))
    sealed.ok("keys vendor -o other.key")
    error = sealed.fails(4, line.replace("vendor.key", "other.key"))
    assert error.startswith(
        "error: m.flex was sealed with another vendor key than other.key (vendor_not_trusted)\n"
        "hint: give the key it was sealed with as --vendor"
    )
    error = sealed.fails(2, line.replace("device.pub", "vendor.pub"))
    assert "vendor.pub is the vendor's own public key" in error
    assert (sealed.directory / "m.lic").read_bytes() == before


def test_an_expired_licence_is_written_with_a_warning(sealed: Shell) -> None:
    result = sealed("license m.flex --vendor vendor.key --device device.pub -o old.lic --expires 2020-01-01")
    assert result.exit_code == 0
    assert "warning: this licence has expired already" in result.stderr
    error = sealed.fails(5, "verify m.flex --license old.lic --device-key device.key --vendor-pub vendor.pub")
    assert "licence_expired" in error


def test_protected_keys_work_everywhere_with_a_passphrase_file(sealed: Shell) -> None:
    secret = sealed.directory / "pass"
    secret.write_text("open sesame")
    secret.chmod(0o600)
    sealed.ok("keys device -o safe.key --passphrase-file pass")
    sealed.ok("license m.flex --vendor vendor.key --device safe.pub -o safe.lic")
    line = "verify m.flex --license safe.lic --device-key safe.key --vendor-pub vendor.pub"
    sealed.ok(f"{line} --passphrase-file pass")
    assert "give --passphrase-file" in sealed.fails(6, line)
    secret.write_text("wrong")
    assert "passphrase_wrong" in sealed.fails(6, f"{line} --passphrase-file pass")
