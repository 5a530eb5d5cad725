"""Before a model without rules of its own is sealed, llama.cpp loads it in a limited child."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flexserve.engine.trial import try_model
from flexserve.errors import ModelUnsupported
from flexserve.sealed.keys import VendorKey
from flexserve.sealed.model_rules import NOT_REVIEWED
from flexserve.sealed.seal import seal

from ..architectures import CASES, NARROW, build, with_weights
from ..sealed.gguf_bytes import STRING, U32, File

OLMO2 = "olmo2"


def olmo2() -> File:
    """Llama with the norms of OLMo 2: an architecture with general rules only."""
    file = CASES["Llama 3"].make(NARROW)
    keys = tuple(replace(k, name=str(k.name).replace("llama.", f"{OLMO2}.", 1)) for k in file.keys)
    weights = []
    for weight in file.weights:
        name = str(weight.name)
        if name.endswith("attn_norm.weight"):
            weights += [
                replace(weight, name=name.replace("attn_norm", part))
                for part in ("attn_q_norm", "post_attention_norm")
            ]
            weights.append(replace(weight, name=name.replace("attn_norm", "attn_k_norm"), shape=(32,)))
        elif name.endswith("ffn_norm.weight"):
            weights.append(replace(weight, name=name.replace("ffn_norm", "post_ffw_norm")))
        elif name != "rope_freqs.weight":
            weights.append(weight)
    made = File(keys, tuple(weights)).with_key("general.architecture", STRING, OLMO2)
    return with_weights(made, "F16", 0)


def test_a_good_model_passes_and_a_broken_one_is_refused_with_llama_cpp_s_reason(tmp_path: Path) -> None:
    assert OLMO2 in NOT_REVIEWED
    path = tmp_path / "m.gguf"
    path.write_bytes(olmo2().to_bytes())
    try_model(path, OLMO2)
    broken = olmo2()
    path.write_bytes(replace(broken, weights=broken.weights[:-1], data=None).to_bytes())
    with pytest.raises(ModelUnsupported, match=r"'olmo2' in a trial: .*ffn_down\.weight' not found"):
        try_model(path, OLMO2)


def test_a_model_that_aborts_llama_cpp_ends_the_child_only(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(olmo2().with_key(f"{OLMO2}.rope.dimension_count", U32, 6).to_bytes())
    with pytest.raises(ModelUnsupported, match="SIGABRT"):
        try_model(path, OLMO2)


def test_only_architectures_without_rules_of_their_own_are_tried(tmp_path: Path) -> None:
    tried: list[str] = []

    def trial(path: Path, architecture: str) -> None:
        tried.append(architecture)
        assert path.exists()

    vendor = VendorKey.generate()
    seal(
        build(CASES["Qwen3"], "Q8_0", tmp_path / "q.gguf", size=NARROW),
        tmp_path / "q.flex",
        vendor,
        trial=trial,
    )
    assert tried == []
    other = tmp_path / "o.gguf"
    other.write_bytes(olmo2().to_bytes())
    seal(other, tmp_path / "o.flex", vendor, trial=trial)
    assert tried == [OLMO2]

    def refuse(_path: Path, _architecture: str) -> None:
        raise ModelUnsupported("no")

    with pytest.raises(ModelUnsupported):
        seal(other, tmp_path / "never.flex", vendor, trial=refuse)
    assert not (tmp_path / "never.flex").exists()
