from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator, FormatChecker, ValidationError

from .conftest import Shell

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"


def validator(name: str) -> Draft202012Validator:
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema, format_checker=FormatChecker())


def test_json_follows_its_schema_and_says_whom_it_trusts(sealed: Shell) -> None:
    for line, trusted in (
        ("inspect m.flex --json", False),
        ("inspect m.flex --json --vendor-pub vendor.pub", True),
    ):
        about = sealed.json(line)
        validator("inspect").validate(about)
        assert (about["vendor_trusted"], about["signature_valid"]) == (trusted, True)
    sealed.ok("keys trust vendor.pub")
    assert sealed.json("inspect m.flex --json")["vendor_trusted"]
    sealed.ok("keys vendor -o other.key")
    assert not sealed.json("inspect m.flex --json --vendor-pub other.pub")["vendor_trusted"]


def test_it_tells_what_was_sealed(sealed: Shell, tiny_gguf: Path) -> None:
    about = sealed.json("inspect m.flex --json")
    size = (sealed.directory / "m.flex").stat().st_size
    assert (about["model_id"], about["model_version"], about["file_bytes"]) == ("demo", 3, size)
    assert (about["architecture"], about["quantization"], about["layers"]) == ("llama", "Q8_0", 1)
    assert (about["tied_output"], about["has_chat_template"]) == (False, True)
    assert about["gguf_bytes"] == tiny_gguf.stat().st_size
    assert sum(region["segments"] for region in about["regions"]) == about["segments"]
    text = sealed.ok("inspect m.flex")
    for piece in ("demo version 3", "llama, Q8_0", "NOT TRUSTED", about["vendor_key_id"]):
        assert piece in text


def test_the_schema_refuses_what_is_not_in_it(sealed: Shell) -> None:
    about = sealed.json("inspect m.flex --json")
    for wrong in ({**about, "secret": 1}, {**about, "layers": "2"}, {**about, "model_id": "a b"}):
        with pytest.raises(ValidationError):
            validator("inspect").validate(wrong)


def test_a_changed_file_is_not_shown(sealed: Shell) -> None:
    path = sealed.directory / "m.flex"
    data = bytearray(path.read_bytes())
    data[140] ^= 1
    path.write_bytes(data)
    result = sealed("inspect m.flex --json")
    assert (result.exit_code, result.stdout) == (4, "")
    assert "manifest_not_authentic" in result.stderr
    assert "sealed_malformed" in sealed.fails(4, "inspect vendor.pub")
