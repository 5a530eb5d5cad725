"""Adapters that a trusted but malicious vendor seals: refused with a reason before llama.cpp sees them.

llama.cpp by itself aborts on most of these, or in the first forward pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import llama_cpp
import pytest

from flexserve.bench.generate import write_model
from flexserve.bench.shapes import shape_named
from flexserve.engine import llama
from flexserve.engine.adapter import SealedAdapter
from flexserve.engine.llama import Model
from flexserve.errors import FlexServeError, ModelMalformed, ModelUnsupported
from flexserve.sealed.adapter_rules import check_adapter, check_fits
from flexserve.sealed.gguf import parse_header, read_header
from flexserve.sealed.keys import VendorKey
from flexserve.sealed.reader import SealedModel
from flexserve.sealed.seal import seal
from flexserve.sealed.verify import verify

from ..adapters import adapter_for, with_random_weights
from ..sealed.gguf_bytes import ARRAY, BOOL, F32, F64, STRING, U32, File, Weight
from ..sealed_fixtures import model_key, seal_unchecked

NAMES = ("blk.0.attn_q.weight", "blk.0.ffn_down.weight", "output.weight")
Change = Callable[[File], File]


def key(name: str, kind: int, value: object, element: int | None = None) -> Change:
    return lambda file: file.with_key(name, kind, value, element)


def shape(name: str, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Change:
    def changed(file: File) -> File:
        weights = tuple(replace(w, shape=change(w.shape)) if w.name == name else w for w in file.weights)
        return with_random_weights(replace(file, weights=weights))

    return changed


def renamed(name: str, to: str) -> Change:
    def changed(file: File) -> File:
        return replace(
            file, weights=tuple(replace(w, name=to) if w.name == name else w for w in file.weights)
        )

    return changed


def without(name: str) -> Change:
    return lambda file: with_random_weights(file.without_weight(name))


def more(*weights: Weight) -> Change:
    return lambda file: with_random_weights(replace(file, weights=(*file.weights, *weights)))


Q = "blk.0.attn_q.weight"
EMBEDDING = "token_embd.weight"

# What is wrong whatever the model is.
MALFORMED: dict[str, tuple[Change, type[FlexServeError], str]] = {
    "alpha NaN": (key("adapter.lora.alpha", F32, float("nan")), ModelMalformed, "lora.alpha' is nan"),
    "alpha infinite": (key("adapter.lora.alpha", F32, float("inf")), ModelMalformed, "lora.alpha' is inf"),
    "alpha huge": (key("adapter.lora.alpha", F32, 3e38), ModelMalformed, "at most 1000000"),
    "alpha of another type": (key("adapter.lora.alpha", U32, 8), ModelMalformed, "must be a float32"),
    "alpha a double": (key("adapter.lora.alpha", F64, 8.0), ModelMalformed, "must be a float32"),
    "no alpha": (lambda f: f.without_key("adapter.lora.alpha"), ModelMalformed, "must be a float32"),
    "type a bool": (key("adapter.type", BOOL, True), ModelMalformed, "'adapter.type' must be a string"),
    "no type": (lambda f: f.without_key("adapter.type"), ModelMalformed, "'adapter.type' must be a string"),
    "another type": (key("adapter.type", STRING, "ia3"), ModelUnsupported, "only 'lora'"),
    "architecture a number": (key("general.architecture", U32, 1), ModelMalformed, "must be a string"),
    "unknown architecture": (key("general.architecture", STRING, "x"), ModelUnsupported, "cannot be served"),
    "tokens that switch it on": (
        key("adapter.alora.invocation_tokens", ARRAY, [1, 2], U32),
        ModelUnsupported,
        "aLoRA",
    ),
    "another float NaN": (key("general.weight", F32, float("nan")), ModelMalformed, "must be finite"),
    "no tensor": (lambda f: replace(f, weights=(), data=b""), ModelMalformed, "no pair"),
    "only norms": (
        lambda f: with_random_weights(replace(f, weights=(Weight("blk.0.attn_norm.weight", (8,)),))),
        ModelMalformed,
        "no pair",
    ),
    "A alone": (without(f"{Q}.lora_b"), ModelMalformed, "has no .lora_b beside it"),
    "B alone": (without(f"{Q}.lora_a"), ModelMalformed, "has no .lora_a beside it"),
    "a tensor of another name": (
        more(Weight("blk.0.attn_q.weight", (8, 8))),
        ModelMalformed,
        "ends in neither",
    ),
    "a pair without a name": (
        more(Weight(".lora_a", (8, 4)), Weight(".lora_b", (4, 8))),
        ModelMalformed,
        "has no name",
    ),
    "a suffix twice": (
        more(Weight(f"{Q}.lora_a.lora_a", (8, 4)), Weight(f"{Q}.lora_a.lora_b", (4, 8))),
        ModelMalformed,
        "has no name",
    ),
    "ranks that differ": (
        shape(f"{Q}.lora_b", lambda s: (s[0] * 2, s[1])),
        ModelMalformed,
        "has rank 4 in A and 8",
    ),
}
# What does not fit this model.
UNFIT: dict[str, tuple[Change, type[FlexServeError], str]] = {
    "another architecture": (
        key("general.architecture", STRING, "qwen3"),
        ModelUnsupported,
        "is for a qwen3 model",
    ),
    "a tensor that is not there": (
        lambda f: renamed(f"{Q}.lora_b", "blk.99.attn_q.weight.lora_b")(
            renamed(f"{Q}.lora_a", "blk.99.attn_q.weight.lora_a")(f)
        ),
        ModelUnsupported,
        "'blk.99.attn_q.weight', which the model does not have",
    ),
    "rows too long": (shape(f"{Q}.lora_a", lambda s: (s[0] * 2, s[1])), ModelUnsupported, "has shapes"),
    "too few rows": (shape(f"{Q}.lora_b", lambda s: (s[0], s[1] // 2)), ModelUnsupported, "has shapes"),
    "layers of experts": (shape(f"{Q}.lora_a", lambda s: (*s, 3)), ModelUnsupported, "has shapes"),
    "layers of experts in both": (
        lambda f: shape(f"{Q}.lora_a", lambda s: (*s, 2))(shape(f"{Q}.lora_b", lambda s: (*s, 2))(f)),
        ModelUnsupported,
        "has shapes",
    ),
    "a fourth dimension": (shape(f"{Q}.lora_b", lambda s: (*s, 1, 2)), ModelUnsupported, "has shapes"),
    "an embedding like a matrix": (
        more(Weight(f"{EMBEDDING}.lora_a", (256, 256)), Weight(f"{EMBEDDING}.lora_b", (256, 1))),
        ModelUnsupported,
        "has shapes",
    ),
}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "m.gguf"
    write_model(shape_named("tiny-llama"), "F16", path)
    return path


def adapter(gguf: Path, change: Change = lambda file: file) -> bytes:
    return change(adapter_for(read_header(gguf)[1], NAMES)).to_bytes()


def test_the_adapter_that_is_changed_below_is_good(gguf: Path, tmp_path: Path) -> None:
    header = parse_header(data := adapter(gguf), len(data))
    check_adapter(header)
    check_fits(header, read_header(gguf)[1])


@pytest.mark.parametrize("what", MALFORMED)
def test_sealing_refuses_what_no_model_could_use(gguf: Path, tmp_path: Path, what: str) -> None:
    change, kind, message = MALFORMED[what]
    path = tmp_path / "a.gguf"
    path.write_bytes(adapter(gguf, change))
    with pytest.raises(kind, match=message):
        seal(path, tmp_path / "a.flex", VendorKey.generate())
    assert not (tmp_path / "a.flex").exists()


@pytest.mark.parametrize("what", [what for what in (*MALFORMED, *UNFIT) if what != "no tensor"])
def test_an_authentic_one_is_refused_before_llama_cpp_reads_it(
    gguf: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, kind, message = MALFORMED[what] if what in MALFORMED else UNFIT[what]
    vendor, flex = VendorKey.generate(), tmp_path / "a.flex"
    seal_unchecked(adapter(gguf, change), flex, vendor)
    reads: list[object] = []
    monkeypatch.setattr(llama_cpp, "llama_adapter_lora_init_from_file_ptr", lambda *args: reads.append(args))
    llama.start()
    model = Model.from_file(gguf, load_mode=llama_cpp.LLAMA_LOAD_MODE_NONE)
    fd = os.open(flex, os.O_RDONLY)
    try:
        sealed = SealedModel.open(fd, [vendor.public])
        unlocked = sealed.unlock(model_key(flex, vendor))
        with pytest.raises(kind, match=f"the adapter: .*{message}"):
            SealedAdapter(unlocked, 1.0).load(model, read_header(gguf)[1])
    finally:
        os.close(fd)
        model.close()
    assert not reads


def test_a_tied_embedding_cannot_be_changed(tmp_path: Path) -> None:
    gguf = tmp_path / "m.gguf"
    write_model(shape_named("tiny-llama-tied"), "F16", gguf)
    model = read_header(gguf)[1]
    made = adapter_for(model, [EMBEDDING])
    header = parse_header(data := made.to_bytes(), len(data))
    check_adapter(header)
    with pytest.raises(ModelUnsupported, match="output matrix too"):
        check_fits(header, model)


def test_a_model_is_no_adapter_and_an_adapter_no_model(gguf: Path, tmp_path: Path) -> None:
    from flexserve.sealed.verify import check_adapter_inside, check_inside

    vendor = VendorKey.generate()
    path = tmp_path / "a.gguf"
    path.write_bytes(adapter(gguf))
    for source, check, message in (
        (gguf, check_adapter_inside, "this is no adapter"),
        (path, check_inside, "only whole models can be served"),
    ):
        flex = tmp_path / f"{source.stem}.flex"
        manifest = seal(source, flex, vendor)
        assert manifest.is_adapter == (source == path)
        fd = os.open(flex, os.O_RDONLY)
        try:
            unlocked = SealedModel.open(fd, [vendor.public]).unlock(model_key(flex, vendor))
            assert verify(unlocked.sealed, unlocked).authentic
            with pytest.raises(ModelUnsupported, match=message):
                check(manifest, unlocked.gguf_header())
        finally:
            os.close(fd)
