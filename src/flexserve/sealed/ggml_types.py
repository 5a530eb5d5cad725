"""The tensor types a GGUF file may hold: elements per block and bytes per block.

Knows the numbers of `enum ggml_type` and the sizes of its blocks (ggml-common.h of the pinned llama.cpp).
Does not know what the bytes of a block mean. Types that ggml only uses for activations (Q8_1, Q8_K) or has
removed are not in the table: no weight may have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class TensorType:
    """One ggml type. A row of `n` elements takes `n // block * block_bytes` bytes."""

    id: int
    name: str
    block: int
    block_bytes: int
    matmul: bool  # ggml's CPU backend can multiply a matrix of this type with activations


def _table(rows: str) -> dict[int, TensorType]:
    types = {}
    for row in rows.split("\n"):
        number, name, block, block_bytes, use = row.split()
        types[int(number)] = TensorType(int(number), name, int(block), int(block_bytes), use == "matmul")
    return types


TENSOR_TYPES: Mapping[int, TensorType] = MappingProxyType(
    _table(
        """0 F32 1 4 matmul
1 F16 1 2 matmul
2 Q4_0 32 18 matmul
3 Q4_1 32 20 matmul
6 Q5_0 32 22 matmul
7 Q5_1 32 24 matmul
8 Q8_0 32 34 matmul
10 Q2_K 256 84 matmul
11 Q3_K 256 110 matmul
12 Q4_K 256 144 matmul
13 Q5_K 256 176 matmul
14 Q6_K 256 210 matmul
16 IQ2_XXS 256 66 matmul
17 IQ2_XS 256 74 matmul
18 IQ3_XXS 256 98 matmul
19 IQ1_S 256 50 matmul
20 IQ4_NL 32 18 matmul
21 IQ3_S 256 110 matmul
22 IQ2_S 256 82 matmul
23 IQ4_XS 256 136 matmul
24 I8 1 1 table
25 I16 1 2 table
26 I32 1 4 table
27 I64 1 8 table
28 F64 1 8 table
29 IQ1_M 256 56 matmul
30 BF16 1 2 matmul
34 TQ1_0 256 54 matmul
35 TQ2_0 256 66 matmul
39 MXFP4 32 17 matmul
40 NVFP4 64 36 matmul
41 Q1_0 128 18 matmul
42 Q2_0 64 18 matmul"""
    )
)

# `general.file_type` (enum llama_ftype): what a quantisation mix is called.
FILE_TYPES: Mapping[int, str] = MappingProxyType(
    {
        0: "F32",
        1: "F16",
        2: "Q4_0",
        3: "Q4_1",
        7: "Q8_0",
        8: "Q5_0",
        9: "Q5_1",
        10: "Q2_K",
        11: "Q3_K_S",
        12: "Q3_K_M",
        13: "Q3_K_L",
        14: "Q4_K_S",
        15: "Q4_K_M",
        16: "Q5_K_S",
        17: "Q5_K_M",
        18: "Q6_K",
        19: "IQ2_XXS",
        20: "IQ2_XS",
        21: "Q2_K_S",
        22: "IQ3_XS",
        23: "IQ3_XXS",
        24: "IQ1_S",
        25: "IQ4_NL",
        26: "IQ3_S",
        27: "IQ3_M",
        28: "IQ2_S",
        29: "IQ2_M",
        30: "IQ4_XS",
        31: "IQ1_M",
        32: "BF16",
        36: "TQ1_0",
        37: "TQ2_0",
        38: "MXFP4_MOE",
    }
)
