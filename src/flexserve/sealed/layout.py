"""Where every tensor of a model lies in its memory image: pure arithmetic on a checked header.

The image is what the arena holds and what is sealed, segment by segment, in execution order:

    0             the token embedding alone (EMBED), padded to whole pages; sealed in units of 16 KiB
    body_offset   all other tensors (BODY), from the next multiple of 1 MiB: what is needed before the first
                  layer, the layers, the output head. Each tensor is aligned to 64 bytes.

A recall takes segments from the end, so the prefix that stays is the part needed first. Knows names of
tensors as llama.cpp writes them; does not know what they contain, nor anything of files or encryption.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..core import PAGE_SIZE, ROW_UNIT_SIZE, SEGMENT_SIZE
from ..errors import InvalidRequest, ModelMalformed
from .family_rules import ENCODERS
from .gguf import GGUFHeader, TensorInfo

TENSOR_ALIGNMENT = 64  # ggml asks for 32; 64 is a cache line
EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"
LEARNED_POSITIONS = "position_embd.weight"

_LAYER = re.compile(r"(enc\.|dec\.)?blk\.([0-9]{1,6})\.(.+)")
_HEAD_PREFIXES = ("output", "dec.output", "cls", "dense_2", "dense_3", "altup_unembd_proj", "nextn.", "d2t")

# Stages of a forward pass.
_INPUTS, _ENCODER, _ENCODER_END, _DECODER, _HEAD = range(5)

# Within a layer, the order in which llama.cpp's graphs use the tensors. Those on one line are used together.
_LAYER_ORDER = (
    "attn_norm attn_norm_2 ln1",
    "attn_qkv attn_q_a attn_q_a_norm attn_q_b attn_q attn_q_norm",
    "attn_k_b attn_kv_a_mqa attn_kv_a_norm attn_kv_b attn_v_b",
    "attn_v attn_k attn_k_norm",  # values before keys: the graph writes them to the cache first
    "attn_rot_embd attn_rel_b attn_sinks",
    "ssm_in ssm_conv1d ssm_x ssm_dt_norm ssm_b_norm ssm_c_norm ssm_dt ssm_a ssm_d ssm_norm ssm_out",
    "attn_gate attn_sub_norm attn_output attn_o attn_output_norm post_attention_norm",
    "cross_attn_norm cross_attn_q cross_attn_k cross_attn_v cross_attn_rel_b cross_attn_o",
    "ffn_norm",
    "ffn_gate_inp exp_probs_b",
    "pre_ffw_norm_2 ffn_norm_exps",
    "ffn_gate_up_exps ffn_gate_exps ffn_gate",
    "ffn_up_exps ffn_up",
    "ffn_act ffn_sub_norm",
    "ffn_down_exps ffn_down",
    "ffn_gate_inp_shexp ffn_gate_shexp",
    "ffn_up_shexp",
    "ffn_down_shexp",
    "post_ffw_norm_1 post_ffw_norm_2 post_ffw_norm layer_output_norm layer_output_scale",
    "inp_gate proj post_norm",
)
_RANK = {
    suffix: (line, column)
    for line, text in enumerate(_LAYER_ORDER)
    for column, suffix in enumerate(text.split())
}
_UNKNOWN_RANK = (-1, 0)

_OrderKey = tuple[int, int, tuple[int, int], int]


@dataclass(frozen=True)
class Placement:
    """The bytes of one tensor in the image, padding not included."""

    image_offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.image_offset + self.nbytes


@dataclass(frozen=True)
class Layout:
    """The image of one model. Sizes in bytes; `placements` in the order of the GGUF file's tensors."""

    placements: tuple[Placement, ...]
    execution_order: tuple[int, ...]  # indices of tensors by image offset; the embedding is first
    embed_bytes: int  # whole pages
    body_offset: int
    body_bytes: int  # whole pages
    image_bytes: int
    tied_output: bool  # the embedding is the output matrix too: every token needs all of it


def plan_layout(header: GGUFHeader) -> Layout:
    """Place every tensor of `header`. Raises `ModelMalformed` without a token embedding."""
    tensors = header.tensors
    names = [t.name for t in tensors]
    if EMBEDDING not in names:
        raise ModelMalformed(f"the model has no tensor {EMBEDDING!r}")
    order = execution_order(names)
    placements: list[Placement | None] = [None] * len(tensors)
    embedding = order[0]
    placements[embedding] = Placement(0, tensors[embedding].nbytes)
    embed_bytes = _round_up(tensors[embedding].nbytes, PAGE_SIZE)
    body_offset = _round_up(embed_bytes, SEGMENT_SIZE)
    end = body_offset
    for index in order[1:]:
        start = _round_up(end, TENSOR_ALIGNMENT)
        placements[index] = Placement(start, tensors[index].nbytes)
        end = start + tensors[index].nbytes
    body_bytes = _round_up(end - body_offset, PAGE_SIZE)
    return Layout(
        placements=tuple(p for p in placements if p is not None),
        execution_order=tuple(order),
        embed_bytes=embed_bytes,
        body_offset=body_offset,
        body_bytes=body_bytes,
        image_bytes=body_offset + body_bytes,
        tied_output=OUTPUT not in names and header.architecture not in ENCODERS,
    )


def plan_adapter(header: GGUFHeader) -> Layout:
    """Place the tensors of an adapter one after the other: it has no embedding, and is always loaded as a whole."""
    placements = []
    end = 0
    for tensor in header.tensors:
        placements.append(Placement(_round_up(end, TENSOR_ALIGNMENT), tensor.nbytes))
        end = placements[-1].end
    image_bytes = _round_up(end, PAGE_SIZE)
    return Layout(
        placements=tuple(placements),
        execution_order=tuple(range(len(placements))),
        embed_bytes=0,
        body_offset=0,
        body_bytes=image_bytes,
        image_bytes=image_bytes,
        tied_output=False,
    )


def execution_order(names: Iterable[str]) -> list[int]:
    """Indices of `names` in the order a forward pass needs the tensors, the token embedding first.

    Names nobody knows keep the place they have in the file: behind the known tensor of the same layer that
    precedes them.
    """
    keys: list[tuple[_OrderKey, int]] = []
    last: dict[tuple[int, int], tuple[int, int]] = {}
    for index, name in enumerate(names):
        stage, layer, suffix = _stage(name)
        rank = _RANK.get(suffix)
        if rank is None:
            rank = last.get((stage, layer), _UNKNOWN_RANK)
        last[stage, layer] = rank
        first = -1 if name == EMBEDDING else stage
        keys.append(((first, layer, rank, index), index))
    return [index for _, index in sorted(keys)]


def _stage(name: str) -> tuple[int, int, str]:
    match = _LAYER.fullmatch(name)
    if match:
        side, layer, rest = match.groups()
        return _ENCODER if side == "enc." else _DECODER, int(layer), rest.split(".")[0]
    if name.startswith("enc.output"):
        return _ENCODER_END, 0, ""
    if name.startswith(_HEAD_PREFIXES):
        # the norm before the matrix
        return _HEAD, 0 if "norm" in name else 1, ""
    return _INPUTS, 0, ""


def rows_to_units(tensor: TensorInfo, rows: Iterable[int]) -> list[int]:
    """The sorted numbers of the 16 KiB units of EMBED that hold these rows of the embedding.

    A row may straddle two units or more. Raises `InvalidRequest` for a row outside the tensor.
    """
    row_bytes, count = tensor.row_bytes, tensor.rows
    units: set[int] = set()
    for row in set(rows):
        if not 0 <= row < count:
            raise InvalidRequest(f"token id {row} is outside the vocabulary of {count} tokens")
        start = row * row_bytes
        units.update(range(start // ROW_UNIT_SIZE, (start + row_bytes - 1) // ROW_UNIT_SIZE + 1))
    return sorted(units)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
