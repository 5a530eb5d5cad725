from __future__ import annotations

import math
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from gguf.quants import dequantize

from flexserve.bench.generate import QUANTIZATIONS, write_model
from flexserve.bench.random_blocks import random_blocks
from flexserve.bench.shapes import SHAPES, shape_named
from flexserve.errors import StorageFailure, Usage
from flexserve.sealed.ggml_types import TENSOR_TYPES
from flexserve.sealed.gguf import check_model, describe, read_header
from flexserve.sealed.layout import plan_layout

TINY = [name for name in SHAPES if name.startswith("tiny-")]


_quiet = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)


def _logits(path: Path, tokens: list[int]) -> npt.NDArray[np.float32]:
    llama_cpp.llama_log_set(_quiet, None)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model
    try:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = 64, 1, 1
        context = llama_cpp.llama_init_from_model(model, settings)
        assert context
        try:
            batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * len(tokens))(*tokens), len(tokens))
            assert llama_cpp.llama_decode(context, batch) == 0
            vocab = llama_cpp.llama_model_get_vocab(model)
            count = llama_cpp.llama_vocab_n_tokens(vocab)
            logits = llama_cpp.llama_get_logits_ith(context, -1)
            return np.array(logits[:count], np.float32)
        finally:
            llama_cpp.llama_free(context)
    finally:
        llama_cpp.llama_model_free(model)


@pytest.mark.parametrize("quant", QUANTIZATIONS)
@pytest.mark.parametrize("name", TINY)
def test_llama_cpp_computes_finite_and_varied_logits(name: str, quant: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_model(shape_named(name), quant, path, seed=1)
    logits = _logits(path, [1, 7, 300, 7])
    assert np.isfinite(logits).all()
    assert 0.01 < logits.std() < 20
    assert len(np.unique(logits)) > 500  # no two rows of the output matrix are alike
    other = _logits(path, [1, 8, 300, 7])
    assert np.abs(other - logits).max() > 1e-3  # the prompt matters


@pytest.mark.parametrize("quant", QUANTIZATIONS)
@pytest.mark.parametrize("name", TINY)
def test_the_files_pass_our_rules_and_say_what_they_are(name: str, quant: str, tmp_path: Path) -> None:
    shape = shape_named(name)
    path = tmp_path / "m.gguf"
    size = write_model(shape, quant, path)
    assert size == path.stat().st_size
    _, header = read_header(path)
    check_model(header)
    said = describe(header)
    assert (said.architecture, said.quantization, said.layers) == (shape.architecture, quant, shape.layers)
    assert 0 <= said.parameters - shape.parameters < 0.01 * shape.parameters
    assert plan_layout(header).tied_output == shape.tied_output


def test_the_same_seed_gives_the_same_file_and_another_does_not(tmp_path: Path) -> None:
    files = [tmp_path / n for n in ("a", "b", "c")]
    for path, seed in zip(files, (5, 5, 6), strict=True):
        write_model(shape_named("tiny-qwen3"), "Q8_0", path, seed)
    first, same, other = (path.read_bytes() for path in files)
    assert first == same != other


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_model(shape_named("tiny-llama"), "F16", tmp_path / "m", progress=lambda d, t: seen.append((d, t)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_0", "IQ4_NL", "Q4_K", "Q6_K"])
def test_random_blocks_are_weights_of_mean_0_and_a_sane_spread(name: str) -> None:
    kind = next(k for k in TENSOR_TYPES.values() if k.name == name)
    blocks = random_blocks(name, 400_000 // kind.block, np.random.default_rng(3))
    assert blocks.shape == (400_000 // kind.block, kind.block_bytes) or kind.block == 1
    if name == "F16":
        weights = blocks.view(np.float16).astype(np.float32)
    else:
        weights = dequantize(blocks, gguf.GGMLQuantizationType(kind.id))
    assert np.isfinite(weights).all()
    assert 0.015 < weights.std() < 0.035
    assert abs(weights.mean()) < 0.01 * weights.std() + 3 * weights.std() / math.sqrt(len(blocks))
    assert np.abs(weights).max() < 0.2


def test_the_true_shapes_have_the_published_number_of_weights() -> None:
    billions = {
        "llama-3.2-1b": 1.236,
        "llama-3.2-3b": 3.213,
        "llama-3.1-8b": 8.030,
        "qwen3-0.6b": 0.596,
        "qwen3-1.7b": 1.721,
    }
    for name, expected in billions.items():
        assert round(shape_named(name).parameters / 1e9, 3) == pytest.approx(expected, abs=1.1e-3), name


def test_unknown_names_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(Usage, match="llama-9"):
        shape_named("llama-9")
    with pytest.raises(Usage, match="Q3"):
        write_model(shape_named("tiny-llama"), "Q3", tmp_path / "m")


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "m"
    (target / "occupied").mkdir(parents=True)
    with pytest.raises(StorageFailure, match="m"):
        write_model(shape_named("tiny-llama"), "Q8_0", target)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
