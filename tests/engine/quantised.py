"""Small models quantised by llama.cpp itself, also in ways that real files come in and our generator does not make."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp

from flexserve.bench.shapes import ModelShape

from .secure_models import Opener

FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "IQ4_NL": 25}  # llama.h, enum llama_ftype


def quantised(opener: Opener, shape: ModelShape, quant: str, *, pure: bool = False) -> Path:
    """Random weights of this shape, quantised. `pure`: every matrix, a tied embedding too, in the same type."""
    source = opener.generate(shape, "F16")
    path = source.with_name(f"{shape.name}-llama-{quant}{'-pure' if pure else ''}.gguf")
    if not path.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.pure, params.nthread = FILE_TYPES[quant], pure, 1
        status = llama_cpp.llama_model_quantize(
            str(source).encode(), str(path).encode(), ctypes.byref(params)
        )
        assert status == 0
    return path
