"""Random bytes that are valid blocks of a quantisation type, with weights of mean 0 and about 0.02 to 0.03.

Making real-valued weights and quantising them takes minutes for a model of 1 GB. Random quants under chosen
scales compute just as fast and have the same size, and take a second. Block layouts: ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def random_blocks(type_name: str, count: int, rng: np.random.Generator) -> Bytes:
    """`count` blocks as an array of shape (count, bytes per block)."""
    return _MAKERS[type_name](count, rng)


def _noise(count: int, width: int, rng: np.random.Generator) -> Bytes:
    words = rng.integers(0, 1 << 64, -(-count * width // 8), dtype=np.uint64)
    return words.view(np.uint8)[: count * width].reshape(count, width)


def _f16(count: int, rng: np.random.Generator) -> Bytes:
    # random sign and mantissa, exponent -8 to -5: rms 0.0275
    bits = _noise(count, 2, rng).view(np.uint16)
    bits &= 0x8FFF
    bits += 7 << 10
    return bits.view(np.uint8)


def _q8_0(count: int, rng: np.random.Generator) -> Bytes:
    # f16 scale, 32 int8. The scale keeps its random mantissa and gets the exponent -12.
    blocks = _noise(count, 34, rng)
    quants = blocks[:, 2:].view(np.int8)
    np.maximum(quants, -127, out=quants)  # quantisers never write -128
    blocks[:, 1] = blocks[:, 1] & 0x03 | 3 << 2
    return blocks


def _q4_0(count: int, rng: np.random.Generator) -> Bytes:
    # f16 scale, 32 nibbles minus 8. The nibbles' mean is -0.5: a random sign of the scale makes it 0.
    blocks = _noise(count, 18, rng)
    blocks[:, 1] = blocks[:, 1] & 0x83 | 7 << 2
    return blocks


def _iq4_nl(count: int, rng: np.random.Generator) -> Bytes:
    # f16 scale, 32 indices into a fixed table of -127 to 113, whose mean is -6: again a random sign
    blocks = _noise(count, 18, rng)
    blocks[:, 1] = blocks[:, 1] & 0x83 | 3 << 2
    return blocks


def _q4_k(count: int, rng: np.random.Generator) -> Bytes:
    # f16 scale, f16 scale of the minima, 8 + 8 packed 6-bit factors, 256 nibbles
    blocks = _noise(count, 144, rng)
    blocks[:, :16] = _q4_k_heads(rng)[blocks[:, 0]]
    return blocks


def _q4_k_heads(rng: np.random.Generator) -> Bytes:
    """256 heads in which each minimum is 7.5 times the scale, the mean of a nibble."""
    heads = np.zeros((256, 16), np.uint8)
    scales = rng.uniform(0.8e-4, 1.2e-4, 256).astype(np.float16)
    heads[:, 0:2] = scales.view(np.uint8).reshape(256, 2)
    heads[:, 2:4] = (scales * np.float16(7.5)).view(np.uint8).reshape(256, 2)
    factors = rng.integers(20, 64, (256, 8), dtype=np.uint8)
    low, high = factors[:, :4], factors[:, 4:]
    heads[:, 4:8] = low | high >> 4 << 6
    heads[:, 8:12] = low | high >> 4 << 6
    heads[:, 12:16] = high & 15 | (high & 15) << 4
    return heads


def _q6_k(count: int, rng: np.random.Generator) -> Bytes:
    # 256 quants of 4 + 2 bits minus 32, 16 int8 factors, f16 scale; the sign of a factor is random
    blocks = _noise(count, 210, rng)
    tails = np.zeros((256, 18), np.uint8)
    factors = rng.integers(8, 25, (256, 16)) * rng.choice((-1, 1), (256, 16))
    tails[:, :16] = factors.astype(np.int8).view(np.uint8)
    tails[:, 16:] = rng.uniform(6.2e-5, 9e-5, 256).astype(np.float16).view(np.uint8).reshape(256, 2)
    blocks[:, 192:] = tails[blocks[:, 192]]
    return blocks


_MAKERS: dict[str, Callable[[int, np.random.Generator], Bytes]] = {
    "F16": _f16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "IQ4_NL": _iq4_nl,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}
