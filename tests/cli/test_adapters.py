"""`--adapter`: sealing one, using it with `run`, and what `run`, `embed` and `serve` say when it cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexserve.cli.serve import ModelOption

from ..adapters import write_adapter
from ..schemas import validate
from .conftest import Shell


@pytest.fixture
def adapter(demo: Shell) -> Shell:
    """The fake model's shell, with files by an adapter's names."""
    (demo.directory / "a.flex").write_text("{}")
    (demo.directory / "a.lic").write_text("{}")
    return demo


def test_an_adapter_is_sealed_licensed_and_used_like_a_model(sealed: Shell, tiny_gguf: Path) -> None:
    write_adapter(sealed.directory / "lora.gguf", tiny_gguf)
    sealed.ok("keys trust vendor.pub")
    assert "random-adapter version 1" in sealed.ok("seal lora.gguf -o a.flex --vendor vendor.key")
    about = sealed.json("inspect a.flex --json")
    validate("inspect", about)
    assert (about["is_adapter"], sealed.json("inspect m.flex --json")["is_adapter"]) == (True, False)
    assert "LoRA adapter for llama, F32" in sealed.ok("inspect a.flex")
    sealed.ok("license a.flex --vendor vendor.key --device device.pub -o a.lic")
    assert "authentic" in sealed.ok("verify a.flex --license a.lic --device-key device.key")
    run = "run m.flex --device-key device.key --raw --temperature 0 --max-tokens 12 --threads 1 --json hello"
    answers = [
        json.loads(sealed.ok(f"{run} {more}"))["token_ids"]
        for more in (
            "",
            "--adapter a.flex",
            "--adapter a.flex --adapter-scale 0",
            "--adapter a.flex --adapter-scale 2",
        )
    ]
    assert answers[0] == answers[2], "nothing of it is nothing"
    assert answers[1] not in (answers[0], answers[3])


@pytest.mark.parametrize("verb", ["run demo.flex", "embed demo.flex"])
def test_what_is_wrong_with_the_options_is_said(adapter: Shell, verb: str) -> None:
    fake = f"{verb} --world fake"
    assert "the fake world applies no adapter" in adapter.fails(7, f"{fake} --adapter a.flex", "x")
    assert "no sealed adapter b.flex" in adapter.fails(3, f"{fake} --adapter b.flex", "x")
    assert "no licence b.lic" in adapter.fails(3, f"{fake} --adapter a.flex --adapter-license b.lic", "x")
    assert "belong to an --adapter" in adapter.fails(2, f"{fake} --adapter-scale 2", "x")
    assert "scale is nan" in adapter.fails(2, f"{fake} --adapter a.flex --adapter-scale nan", "x")
    assert "not with a server's model" in adapter.fails(2, f"{verb[:-5]} --adapter a.flex", "x")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("n=m.flex", ("n", Path("m.flex"), None, None)),
        ("n=m.flex,m.lic", ("n", Path("m.flex"), Path("m.lic"), None)),
        ("n=m.flex,adapter=a.flex", ("n", Path("m.flex"), None, (Path("a.flex"), None, 1.0))),
        (
            "n=m.flex,m.lic,adapter=a.flex,a.lic,scale=-0.5",
            ("n", Path("m.flex"), Path("m.lic"), (Path("a.flex"), Path("a.lic"), -0.5)),
        ),
        ("n=m.flex,adapter=a.flex,scale=2", ("n", Path("m.flex"), None, (Path("a.flex"), None, 2.0))),
    ],
)
def test_serve_takes_an_adapter_with_each_model(value: str, expected: object) -> None:
    assert ModelOption().convert(value, None, None) == expected


@pytest.mark.parametrize(
    "value",
    ["n=m.flex,adapter=", "n=,adapter=a.flex", "n=m.flex,adapter=a.flex,scale=much", "n=m,adapter=a,"],
)
def test_serve_says_which_form_it_wants(adapter: Shell, value: str) -> None:
    error = adapter.fails(2, "serve --world fake --model", value)
    assert "is not of the form NAME=M.flex[,M.lic][,adapter=A.flex[,A.lic][,scale=S]]" in error
