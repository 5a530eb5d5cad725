"""Every architecture in every quantisation: greedy tokens and logits of the sealed model are plain llama.cpp's, bit
for bit; cold, resident, and after a recall. Then what else depends on the architecture: memory and load order."""

from __future__ import annotations

import ctypes
import itertools
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np
import pytest

from flexserve.engine import llama
from flexserve.engine.cache import cache_bytes
from flexserve.flexmem import ggml
from flexserve.sealed.gguf import read_header
from flexserve.sealed.layout import EMBEDDING, execution_order

from ..architectures import CASES, GENERATORS, QUANTS, VOCABULARY, WIDE, build, with_weights
from ..sealed.test_split import split, write_parts
from .secure_models import CONTEXT_TOKENS, Opener, forget, plain, sealed_greedy

NAMES = [case.name for case in GENERATORS]
PROMPT = random.Random(7).choices(range(3, VOCABULARY), k=20)
OTHER = PROMPT[::-1]
COUNT = 5


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_sealed_model_says_what_plain_llama_cpp_says(
    name: str, quant: str, opener: Opener, tmp_path: Path
) -> None:
    gguf = build(CASES[name], quant, tmp_path / f"{name}-{quant}.gguf")
    with plain(gguf) as other:
        expected, different = other.greedy(PROMPT, COUNT), other.greedy(OTHER, 1)
    assert all(np.isfinite(logits).all() for logits in expected.logits)
    assert len({logits.tobytes() for logits in (*expected.logits, *different.logits)}) == COUNT + 1
    opened = opener.open(gguf)
    model = opened.model
    assert model.resident_bytes == 0
    assert sealed_greedy(model, PROMPT, COUNT) == expected  # cold
    assert sealed_greedy(model, OTHER, 1) == different  # nothing of the first prompt is left
    assert sealed_greedy(model, PROMPT, COUNT) == expected  # resident
    forget(model)
    assert sealed_greedy(model, PROMPT, COUNT) == expected  # after a recall
    opener.discard(opened)


def test_a_split_model_says_what_plain_llama_cpp_says_from_its_parts(opener: Opener, tmp_path: Path) -> None:
    whole = with_weights(CASES["Qwen3"].make(WIDE), "Q8_0", 3)
    count = len(whole.weights)
    paths = write_parts(split(whole, [2, count - 5, 3]), tmp_path)
    with plain(paths[0]) as other:
        expected = other.greedy(PROMPT, COUNT)
    opened = opener.open(paths[0])
    assert sealed_greedy(opened.model, PROMPT, COUNT) == expected
    opener.discard(opened)


@contextmanager
def log_of_llama_cpp() -> Iterator[list[str]]:
    lines: list[str] = []
    note = api.llama_log_callback(lambda _level, text, _user: lines.append(text.decode("utf-8", "replace")))
    api.llama_log_set(note, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        api.llama_log_set(llama._on_log, ctypes.c_void_p(0))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_remembered_takes_the_memory_we_compute(name: str, opener: Opener, tmp_path: Path) -> None:
    gguf = build(CASES[name], "Q8_0", tmp_path / f"{name}.gguf")
    with log_of_llama_cpp() as lines:
        opened = opener.open(gguf)
    sizes = [
        float(found[1])
        for line in lines
        if (found := re.search(r"llama_(?:kv_cache|memory_recurrent): size = +([0-9.]+) MiB", line))
    ]
    assert sizes
    computed = cache_bytes(read_header(gguf)[1], CONTEXT_TOKENS)
    assert opened.model.status().kv_bytes == computed
    assert computed / (1 << 20) == pytest.approx(sum(sizes), abs=0.01 * len(sizes))
    opener.discard(opened)


def weights_in_order_of_use(model: llama.Model, names: set[str], tokens: list[int]) -> list[str]:
    """The names of the weights, as the nodes of llama.cpp's graph touch them first."""
    base = ggml.ggml_base()
    sources = ggml._data_offset() - 16 - 80  # ggml_tensor: src[10], view_src, view_offs, data
    used: dict[str, None] = {}

    def look(node: int, ask: bool, _user: Any) -> bool:
        if ask:
            pointers = (ctypes.c_void_p * 10).from_address(node + sources)
            for pointer in itertools.takewhile(bool, pointers):
                assert pointer is not None
                name = ctypes.string_at(base.ggml_get_name(pointer)).decode()
                name = name.split(" ")[0]  # "x (view)", "x (reshaped)"
                if name in names:
                    used.setdefault(name)
        return False

    params = api.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1
    callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(look)
    params.cb_eval = ctypes.cast(callback, type(params.cb_eval))
    context = api.llama_init_from_model(model.handle, params)
    array = (api.llama_token * len(tokens))(*tokens)
    assert api.llama_decode(context, api.llama_batch_get_one(array, len(tokens))) == 0
    api.llama_free(context)
    return list(used)


@pytest.mark.parametrize("name", NAMES)
def test_segments_lie_in_the_order_in_which_llama_cpp_uses_the_tensors(name: str, tmp_path: Path) -> None:
    gguf = build(CASES[name], "Q8_0", tmp_path / f"{name}.gguf")
    names = [t.name for t in read_header(gguf)[1].tensors]
    laid_out = [names[i] for i in execution_order(names)]
    with plain(gguf) as other:
        used = weights_in_order_of_use(other.model, set(names), PROMPT)
    assert used[0] == laid_out[0] == EMBEDDING
    assert len(names) - len(used) <= 1  # the other rope factors of Phi
    # What all layers share comes first, before the layer that uses it: a few hundred bytes.
    shared = [name for name in laid_out if name.startswith("rope_")]
    in_use = [name for name in used if name not in shared]
    in_place = [name for name in laid_out if name in in_use]
    if name == "Gemma 3":  # its graph asks for keys before values
        in_use = [
            n.replace("attn_v.", "attn_*.").replace("attn_k.", "attn_*.") for n in in_use if "k_norm" not in n
        ]
        in_place = [
            n.replace("attn_v.", "attn_*.").replace("attn_k.", "attn_*.")
            for n in in_place
            if "k_norm" not in n
        ]
    assert in_use == in_place
