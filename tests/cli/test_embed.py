"""`flexserve embed`, over the fake world: its own, and a server's; and the real one once."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from flexserve.cli.main import cli
from flexserve.engine.fake import FakeEngine, Script, fake_embedding
from flexserve.errors import EngineFailure
from flexserve.worlds.fake import FakeWorld

from ..architectures import CASES, build
from ..schemas import validate
from ..server.running import Running, serving
from .conftest import Shell

EMBED = "embed demo.flex --world fake"


def vector(text: str) -> list[float]:
    return list(struct.unpack("<8f", fake_embedding(text)))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    scripts = {"fail": Script("", EngineFailure("the engine stopped"))}
    with serving(tmp_path, FakeWorld(FakeEngine(scripts))) as running:
        monkeypatch.setenv("FLEXSERVE_ADMIN_SOCKET", str(running.admin))
        yield running


def test_each_text_is_one_line_of_numbers(demo: Shell) -> None:
    lines = demo.ok(EMBED, "one", "two words").splitlines()
    assert [json.loads(line) for line in lines] == [vector("one"), vector("two words")]


def test_json_is_one_object_that_follows_its_schema(demo: Shell) -> None:
    found = demo.json(EMBED, "--json", "one", "two")
    validate("embed", found)
    assert found["embeddings"] == [vector("one"), vector("two")]
    assert found["timings"][0]["prompt_tokens"] == 3


def test_a_text_may_come_from_stdin(demo: Shell) -> None:
    result = CliRunner().invoke(cli, EMBED.split(), input="piped\n", prog_name="flexserve")
    assert json.loads(result.stdout) == vector("piped")


def test_a_server_s_model_is_used_by_name(server: Running, shell: Shell) -> None:
    assert json.loads(shell.ok("embed demo", "hello")) == vector("hello")
    assert "the engine stopped" in shell.fails(7, "embed demo", "fail")
    assert "absent" in shell.fails(3, "embed absent", "x")


def test_an_empty_text_is_refused(demo: Shell) -> None:
    assert "empty" in demo.fails(2, EMBED, "")


def test_a_sealed_encoder_embeds(sealed: Shell, tmp_path: Path) -> None:
    gguf = build(CASES["BERT"], "Q8_0", tmp_path / "bert.gguf")
    sealed.ok("seal -o bert.flex --vendor vendor.key", gguf)
    sealed.ok("license bert.flex --vendor vendor.key --device device.pub -o bert.lic")
    trusted = "--device-key device.key --vendor-pub vendor.pub --threads 1"
    one, two = (
        json.loads(line) for line in sealed.ok(f"embed bert.flex {trusted}", "ab cd", "xy").splitlines()
    )
    assert len(one) == len(two) == 256
    assert one != two
    assert "makes embeddings, no text" in sealed.fails(2, f"run bert.flex {trusted} --raw", "ab")
