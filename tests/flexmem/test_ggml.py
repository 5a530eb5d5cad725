"""Our declarations of ggml's internal structures: checked against the library, and refused when they differ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexserve.bench.generate import write_model
from flexserve.engine import llama
from flexserve.engine.llama import Model
from flexserve.errors import EngineIncompatible, ModelUnsupported
from flexserve.flexmem import ggml, uffd
from flexserve.sealed.gguf import GGUFHeader, read_header
from flexserve.sealed.layout import plan_layout

from ..sealed_fixtures import TINY


@pytest.fixture(scope="module", autouse=True)
def _started() -> None:
    llama.start()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ggml") / "m.gguf"
    write_model(TINY, "Q8_0", path)
    return path


@pytest.fixture(scope="module")
def header(gguf: Path) -> GGUFHeader:
    return read_header(gguf)[1]


Places = list[tuple[str, int, int]]


@pytest.fixture
def places(header: GGUFHeader) -> Places:
    placements = plan_layout(header).placements
    return [(t.name, p.image_offset, p.nbytes) for t, p in zip(header.tensors, placements, strict=True)]


@pytest.fixture
def base(header: GGUFHeader) -> Iterator[int]:
    length = plan_layout(header).image_bytes
    address = uffd.reserve(length)
    yield address
    uffd.release(address, length)


class Changed:
    """libggml-base with one function changed."""

    def __init__(self, **changes: Any) -> None:
        self._library = ggml.ggml_base()
        self._changes = changes

    def __getattr__(self, name: str) -> Any:
        return self._changes[name] if name in self._changes else getattr(self._library, name)


def test_the_installed_library_passes() -> None:
    ggml.self_test()


def test_another_version_of_the_binding_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "PINNED_BINDING", "0.3.35")
    with pytest.raises(EngineIncompatible, match=r"0\.3\.36 is installed.*0\.3\.35") as caught:
        ggml.self_test()
    assert "make setup" in caught.value.hint


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("get_base", {"ggml_backend_buffer_get_base": lambda _: 4096}),
        ("get_alignment", {"ggml_backend_buffer_get_alignment": lambda _: 32}),
        ("size", {"ggml_backend_buffer_get_size": lambda _: 0}),
        ("type", {"ggml_backend_buffer_get_type": lambda _: 0}),
        ("get_name", {"ggml_backend_buft_name": lambda _: b"CPU"}),
        ("init_tensor", {"ggml_get_data": lambda _: 0}),
        ("not host while loading", {"ggml_backend_buffer_is_host": lambda _: True}),
        ("host after loading", {"ggml_backend_buffer_is_host": lambda _: False}),
        ("get_tensor", {"ggml_backend_tensor_get": lambda *_: None}),
    ],
)
def test_a_library_that_does_something_else_is_refused_by_what_differs(
    monkeypatch: pytest.MonkeyPatch, what: str, change: dict[str, Any]
) -> None:
    ggml._data_offset()  # found before the library is changed
    changed = Changed(**change)
    monkeypatch.setattr(ggml, "ggml_base", lambda: changed)
    with pytest.raises(EngineIncompatible, match=what):
        ggml.self_test()


def test_a_library_that_makes_no_buffer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = Changed(ggml_backend_alloc_ctx_tensors_from_buft=lambda *_: None)
    monkeypatch.setattr(ggml, "ggml_base", lambda: changed)
    with pytest.raises(EngineIncompatible, match="alloc_buffer"):
        ggml.self_test()


def test_a_tensor_whose_data_field_cannot_be_found_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = Changed(ggml_get_data=lambda _: 0xDEAD0000BEEF0001)
    monkeypatch.setattr(ggml, "ggml_base", lambda: changed)
    ggml._data_offset.cache_clear()
    with pytest.raises(EngineIncompatible, match="data field"):
        ggml._data_offset()
    ggml._data_offset.cache_clear()


def load(gguf: Path, header: GGUFHeader, base: int, places: Places) -> None:
    """Load from the skeleton, use the vocabulary, free everything."""
    buffer_type = ggml.ArenaBufferType("flexmem-test", base, places)
    try:
        data = gguf.read_bytes()
        model = Model.from_skeleton(data[: header.data_offset], len(data), buffer_type)
        assert model.vocab.size == TINY.vocabulary
        model.close()
    finally:
        buffer_type.close()  # raises when a buffer was left


def test_a_model_loads_from_its_header_without_touching_the_arena(
    gguf: Path, header: GGUFHeader, base: int, places: Places
) -> None:
    load(gguf, header, base, places)
    assert not any(uffd.resident_pages(base, plan_layout(header).image_bytes))


@pytest.mark.parametrize("at", [0, 5, -1])
def test_a_table_without_one_of_the_tensors_fails_the_load_and_leaves_nothing(
    gguf: Path, header: GGUFHeader, base: int, places: Places, at: int
) -> None:
    del places[at]
    with pytest.raises(ModelUnsupported):
        load(gguf, header, base, places)
    assert not any(uffd.resident_pages(base, plan_layout(header).image_bytes))


def test_a_table_with_another_size_for_a_tensor_fails_the_load(
    gguf: Path, header: GGUFHeader, base: int, places: Places
) -> None:
    name, offset, nbytes = places[3]
    places[3] = (name, offset, nbytes + 64)
    with pytest.raises(ModelUnsupported):
        load(gguf, header, base, places)


def test_a_buffer_type_in_use_is_not_freed(gguf: Path, header: GGUFHeader, base: int, places: Places) -> None:
    buffer_type = ggml.ArenaBufferType("flexmem-busy", base, places)
    data = gguf.read_bytes()
    model = Model.from_skeleton(data[: header.data_offset], len(data), buffer_type)
    with pytest.raises(AssertionError):
        buffer_type.close()
    model.close()
    buffer_type.close()
    buffer_type.close()
