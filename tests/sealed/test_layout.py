from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexserve.core import PAGE_SIZE, ROW_UNIT_SIZE, SEGMENT_SIZE
from flexserve.errors import InvalidRequest, ModelMalformed
from flexserve.sealed.gguf import GGUFHeader, TensorInfo, parse_header
from flexserve.sealed.layout import TENSOR_ALIGNMENT, execution_order, plan_layout, rows_to_units

from .gguf_bytes import File, Weight, tiny_model


def _header(file: File) -> GGUFHeader:
    data = file.to_bytes()
    return parse_header(data, len(data))


_suffixes = st.sampled_from(
    [
        "attn_norm.weight",
        "attn_q.weight",
        "attn_q.bias",
        "attn_k.weight",
        "ffn_down.weight",
        "ffn_up.weight",
        "strange.weight",
        "ffn_gate_exps.weight",
        "ssm_a",
        "post_ffw_norm.weight",
    ]
)
_names = st.one_of(
    st.builds(
        lambda p, n, s: f"{p}blk.{n}.{s}",
        st.sampled_from(("", "enc.", "dec.")),
        st.integers(0, 40),
        _suffixes,
    ),
    st.sampled_from(
        ("output.weight", "output_norm.weight", "rope_freqs.weight", "position_embd.weight", "odd")
    ),
)


@given(
    st.lists(
        st.tuples(_names, st.integers(1, 40), st.integers(1, 40)), max_size=30, unique_by=lambda x: x[0]
    ),
    st.integers(0, 30),
    st.integers(1, 3000),
)
def test_every_tensor_has_its_own_aligned_bytes(
    others: list[tuple[str, int, int]], position: int, vocabulary: int
) -> None:
    weights = [Weight(name, (32 * rows, columns)) for name, rows, columns in others]
    weights.insert(min(position, len(weights)), Weight("token_embd.weight", (32, vocabulary)))
    header = _header(File((), tuple(weights)))
    layout = plan_layout(header)
    assert layout == plan_layout(header)
    assert sorted(layout.execution_order) == list(range(len(weights)))
    assert [p.nbytes for p in layout.placements] == [t.nbytes for t in header.tensors]
    end = 0
    for index in layout.execution_order:  # which is the order in memory
        place = layout.placements[index]
        assert place.image_offset % TENSOR_ALIGNMENT == 0
        assert place.image_offset >= end
        end = place.end
    embedding = layout.placements[layout.execution_order[0]]
    assert header.tensors[layout.execution_order[0]].name == "token_embd.weight"
    assert embedding.image_offset == 0
    assert embedding.nbytes <= layout.embed_bytes <= layout.body_offset
    assert layout.embed_bytes % PAGE_SIZE == layout.body_bytes % PAGE_SIZE == 0
    assert layout.body_offset % SEGMENT_SIZE == 0
    assert layout.image_bytes == layout.body_offset + layout.body_bytes >= end
    # no room wasted beyond alignment
    assert layout.image_bytes - sum(t.nbytes for t in header.tensors) < (
        SEGMENT_SIZE + 2 * PAGE_SIZE + TENSOR_ALIGNMENT * len(weights)
    )
    assert layout.tied_output == ("output.weight" not in [w.name for w in weights])


@given(st.lists(_names, unique=True, max_size=40))
def test_layers_follow_each_other_between_inputs_and_the_head(names: list[str]) -> None:
    names = [*names, "token_embd.weight"]
    ordered = [names[i] for i in execution_order(names)]

    def stage(name: str) -> tuple[int, int]:
        if name == "token_embd.weight":
            return -1, 0
        if name.startswith("output"):
            return 9, 0
        if "blk." not in name:
            return 0, 0
        return (1 if name.startswith("enc.") else 2), int(name.split("blk.")[1].split(".", maxsplit=1)[0])

    stages = [stage(name) for name in ordered]
    assert stages == sorted(stages)


def test_a_llama_layer_is_in_the_order_of_the_graph() -> None:
    names = [str(w.name) for w in tiny_model(layers=2).weights]
    shuffled = sorted(names)
    ordered = [shuffled[i] for i in execution_order(shuffled)]
    for layer in range(2):  # files have keys before values; the graph computes values first
        key = names.index(f"blk.{layer}.attn_k.weight")
        names[key : key + 2] = names[key + 1], names[key]
    assert ordered == names


def test_attention_comes_before_the_feed_forward_part_with_biases_beside_weights() -> None:
    parts = [
        "attn_norm.weight",
        "attn_q.weight",
        "attn_q.bias",
        "attn_v.weight",
        "attn_k.weight",
        "attn_k_norm.weight",
        "attn_output.weight",
        "ffn_norm.weight",
        "ffn_gate_inp.weight",
        "ffn_up_exps.weight",
        "ffn_down_exps.weight",
        "post_ffw_norm.weight",
    ]
    names = [f"blk.0.{p}" for p in parts]
    backwards = [*names[:1], *names[:3:-1], *names[1:4]]  # weight before bias, as files have them
    assert [backwards[i] for i in execution_order(backwards)] == names


def test_an_unknown_tensor_stays_behind_its_neighbour_in_the_file() -> None:
    names = [
        "blk.0.ffn_down.weight",
        "blk.0.attn_norm.weight",
        "blk.0.new_thing.weight",
        "blk.0.attn_q.weight",
    ]
    ordered = [names[i] for i in execution_order(names)]
    assert ordered == [names[1], names[2], names[3], names[0]]


def test_the_encoder_ends_before_the_decoder_begins() -> None:
    names = [
        "dec.blk.0.attn_q.weight",
        "enc.output_norm.weight",
        "enc.blk.7.attn_q.weight",
        "dec.output_norm.weight",
    ]
    assert execution_order(names) == [2, 1, 0, 3]


def test_a_model_without_an_embedding_has_no_layout() -> None:
    with pytest.raises(ModelMalformed, match=r"token_embd\.weight"):
        plan_layout(_header(File((), (Weight("w", (32,)),))))


@given(st.integers(1, 400), st.integers(1, 500), st.data())
def test_the_units_of_rows_cover_each_row_and_nothing_else(
    blocks: int, rows: int, data: st.DataObject
) -> None:
    tensor = TensorInfo("token_embd.weight", (32 * blocks, rows), 8, 0, blocks * 34 * rows)
    wanted = data.draw(st.lists(st.integers(0, rows - 1), max_size=20))
    units = rows_to_units(tensor, wanted)
    size = tensor.row_bytes
    needed = {byte // ROW_UNIT_SIZE for r in wanted for byte in range(r * size, (r + 1) * size)}
    assert units == sorted(needed)


def test_a_token_outside_the_vocabulary_has_no_row() -> None:
    tensor = TensorInfo("token_embd.weight", (32, 10), 0, 0, 1280)
    for token in (-1, 10):
        with pytest.raises(InvalidRequest, match="vocabulary of 10 tokens"):
            rows_to_units(tensor, [token])
