"""Of a mixture of experts, a prompt brings in the experts it chooses and no others."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp as api
import pytest

from flexserve.engine import llama
from flexserve.flexmem import ggml
from flexserve.flexmem.arena import SegmentState
from flexserve.sealed.gguf import read_header
from flexserve.sealed.layout import plan_layout

from ..architectures import CASES, WIDE, build
from .secure_models import Opened, Opener, answer, forget, plain, request, sealed_greedy, settle

SIZE = replace(WIDE, experts=64)  # of 204 kB in three matrices: 26 MB of experts in all
LAYERS, USED = SIZE.layers, 2
TOKEN = 17


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(CASES["Qwen3-MoE"], "Q8_0", tmp_path_factory.mktemp("experts") / "experts.gguf", size=SIZE)


@pytest.fixture(scope="module")
def opened(gguf: Path, opener: Opener) -> Opened:
    return opener.open(gguf)


def chosen_experts(model: llama.Model, token: int) -> list[list[int]]:
    """Which experts each layer sends that one token to, as llama.cpp's router says."""
    base = ggml.ggml_base()
    chosen: dict[str, list[int]] = {}

    def look(node: int, ask: bool, _user: Any) -> bool:
        name = ctypes.string_at(base.ggml_get_name(node)).decode()
        if not name.startswith("ffn_moe_topk-"):
            return False
        if not ask:
            chosen[name] = list((ctypes.c_int32 * USED).from_address(base.ggml_get_data(node)))
        return True

    params = api.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1
    callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(look)
    params.cb_eval = ctypes.cast(callback, type(params.cb_eval))
    context = api.llama_init_from_model(model.handle, params)
    array = (api.llama_token * 1)(token)
    assert api.llama_decode(context, api.llama_batch_get_one(array, 1)) == 0
    api.llama_free(context)
    return [chosen[f"ffn_moe_topk-{layer}"] for layer in range(LAYERS)]


def segments_of(gguf: Path, opened: Opened, experts: list[list[int]]) -> set[int]:
    """The segments in which these experts' matrices lie."""
    header = read_header(gguf)[1]
    places = dict(zip((t.name for t in header.tensors), plan_layout(header).placements, strict=True))
    found: set[int | None] = set()
    for layer, numbers in enumerate(experts):
        for part in ("gate", "up", "down"):
            place = places[f"blk.{layer}.ffn_{part}_exps.weight"]
            each = place.nbytes // SIZE.experts
            for number in numbers:
                first = place.image_offset + number * each
                found |= {opened.model.arena.segment_at(at) for at in (first, first + each - 1)}
    assert None not in found
    return {index for index in found if index is not None}


def test_a_cold_start_reads_the_chosen_experts_and_no_others(gguf: Path, opened: Opened) -> None:
    with plain(gguf) as other:
        chosen = chosen_experts(other.model, TOKEN)
    assert all(len(set(numbers)) == USED for numbers in chosen)
    model = opened.model
    forget(model)
    finished = answer(model, request(token_ids=(TOKEN,), max_tokens=1))
    settle(model)
    of_experts = {i for r in model._needs.experts for i in range(r.first, r.first + r.count)}
    resident = set(model.arena.segments_in(SegmentState.RESIDENT))
    assert resident & of_experts == segments_of(gguf, opened, chosen) & of_experts
    body = model.arena.regions[-1]
    dense = set(range(body.first_segment, body.first_segment + body.segment_count)) - of_experts
    assert dense <= resident
    everything = model.info.weight_bytes
    assert model.resident_bytes < 0.6 * everything  # the counter
    assert finished.timings.load_bytes == model.resident_bytes
    assert model.status().resident_bytes == model.resident_bytes


def test_later_tokens_bring_in_what_they_choose_and_say_what_plain_llama_cpp_says(
    gguf: Path, opened: Opened
) -> None:
    forget(opened.model)
    with plain(gguf) as other:
        expected = other.greedy([TOKEN], 12)
    assert sealed_greedy(opened.model, [TOKEN], 12) == expected
    settle(opened.model)
    after = opened.model.resident_bytes
    assert sealed_greedy(opened.model, [TOKEN], 12) == expected
    settle(opened.model)
    assert opened.model.resident_bytes == after  # the same tokens choose the same experts


def test_a_dense_model_has_no_experts(opener: Opener, tmp_path: Path) -> None:
    opened = opener.open(build(CASES["Llama 3"], "Q8_0", tmp_path / "dense.gguf"))
    assert opened.model._needs.experts == []
    opener.discard(opened)
