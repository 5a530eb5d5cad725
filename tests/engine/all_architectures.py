"""A model of any architecture llama.cpp knows, with whatever tensors llama.cpp itself says it has.

The hyperparameters follow llama.cpp's own test of its architectures (tests/test-llama-archs.cpp); the weights are
random F32. Such a model resembles no published one (every optional tensor is there), but it goes through the
architecture's whole graph.
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np

from flexserve.engine import llama
from flexserve.engine.embedding import packed
from flexserve.errors import FlexServeError, ModelUnsupported
from flexserve.sealed.family_rules import ENCODERS

from ..architectures import VOCABULARY, with_weights
from ..sealed.gguf_bytes import ARRAY, BOOL, F32, I32, STRING, U32, File, Key, Weight, strings
from .secure_models import Opener, answer, forget, plain, request, sealed_greedy
from .test_embeddings import PlainEmbedder

PROMPT = random.Random(4).choices(range(3, VOCABULARY), k=12)

_LATENT = [
    "deepseek2",
    "deepseek32",
    "glm-dsa",
    "dots3note",
    "kimi-linear",
    "bailingmoe3",
    "kimi-k3",
    "glm5-next",
    "mistral4",
    "hy_v4",
]
_HYBRID = [
    "plamo2",
    "jamba",
    "nemotron_h",
    "nemotron_h_moe",
    "granitehybrid",
    "lfm2",
    "lfm2moe",
    "kimi-linear",
    "bailingmoe3",
    "kimi-k3",
    "glm5-next",
]
_PATTERNS = ["cohere2moe", "mimo2", "step35", "spark2_5", "muse-glimmer", "granite_swa", "dots3note", "maple"]
_MIXTURES = [
    "llama4",
    "grok",
    "qwen2moe",
    "qwen3moe",
    "qwen3next",
    "qwen3vlmoe",
    "qwen35moe",
    "phimoe",
    "dbrx",
    "olmoe",
    "arctic",
    "deepseek",
    "deepseek2",
    "glm4moe",
    "exaone-moe",
    "bailingmoe",
    "bailingmoe2",
    "dots1",
    "afmoe",
    "ernie4_5",
    "ernie4_5-moe",
    "hunyuan-moe",
    "gpt-oss",
    "lfm2moe",
    "smallthinker",
    "grovemoe",
    "minimax-m2",
    "mimo2",
    "kimi-linear",
    "step35",
    "mistral4",
    "granitemoe",
    "nemotron_h_moe",
    "jamba",
    "granitehybrid",
    "cohere2moe",
    "qwen4exp",
    "deepseek32",
    "dots3note",
    "deepseek4",
    "glm-dsa",
    "hy_v3",
    "hy_v4",
    "bailingmoe3",
    "minimax-01",
    "minimax-m3",
    "paddleocr",
    "kimi-k3",
    "glm5-next",
    "mellum",
    "laguna",
    "maple",
    "nomic-bert-moe",
]


def _special(arch: str, layers: int, head: int, heads: int) -> dict[str, Any]:
    """What single architectures ask for."""
    if arch == "gemma4":
        return {"attention.sliding_window_pattern": [1, 1, 1, 1, 0]}
    if arch in ("arwkv7", "rwkv6qwen2"):
        return {"token_shift_count": 1}
    if arch == "deepseek4":
        return {
            "attention.head_count_kv": 1,
            "attention.key_length": head,
            "attention.value_length": head,
            "rope.dimension_count": head // 2,
            "attention.q_lora_rank": 64,
            "attention.output_group_count": 8,
            "attention.output_lora_rank": 32,
            "attention.compress_ratios": [0, 0, 4, 128],
            "attention.compress_rope_freq_base": 160000.0,
            "hyper_connection.count": 4,
            "hyper_connection.sinkhorn_iterations": 2,
            "hyper_connection.epsilon": 1e-6,
            "hash_layer_count": 0,
            "swiglu_clamp_exp": 10.0,
            "expert_weights_scale": 1.0,
            "expert_weights_norm": True,
        }
    if arch == "hy_v4":
        return {
            "hyper_connection.count": 4,
            "hyper_connection.epsilon": 1e-6,
            "hyper_connection.magnitude": 2.0,
            "swiglu_clamp_exp": 10.0,
            "attention.indexer.types": [1 - i % 2 for i in range(layers)],
        }
    if arch == "dots3note":
        return {
            "attention.kv_lora_rank_swa": 512,
            "attention.key_length_swa": 576,
            "attention.value_length_swa": 512,
            "attention.key_length_mla_swa": 192,
            "attention.value_length_mla_swa": 128,
            "rope.freq_base_swa": 10000.0,
            "attention.indexer.types": [1 - i % 2 for i in range(layers)],
        }
    if arch in ("qwen4exp", "glm5-next"):
        return {
            "hyper_connection.count": 4,
            "hyper_connection.sinkhorn_iterations": 2,
            "hyper_connection.epsilon": 1e-6,
            "hyper_connection.low_rank": 8,
            "attention.compress_ratios": [4] * layers,
        }
    others: dict[str, dict[str, Any]] = {
        "hrm_text": {"hrm.layers_per_stack": 1, "hrm.h_cycles": 2, "hrm.l_cycles": 2},
        "maple": {"swiglu_clamp_exp": 7.0},
        "minimax-m3": {"rope.dimension_count": 64},
        "muse-glimmer": {"attention.head_count_kv": 2},
        "afmoe": {"attention.head_count_kv": 2},
    }
    return others.get(arch, {})


def header(arch: str) -> File:
    """Keys without tensors."""
    layers = {
        "llama4": 4,
        "gemma4": 5,
        "gemma3n": 22,
        "deepseek4": 4,
        "hrm_text": 6,
        "nemotron_h": 3,
        "nemotron_h_moe": 3,
    }.get(arch, 2)
    width, heads, hidden = 256, 2, 384
    if arch in _LATENT:
        width, heads, hidden = 128, 1, 192
    elif arch == "gemma3n":
        width, heads, hidden = 64, 1, 96
    elif arch == "gemma4":
        width, hidden = 128, 192
    elif arch == "deepseek4":
        width, heads, hidden = 512, 8, 1024
    elif arch in ("step35", "laguna"):
        width = 160
    elif arch in ("afmoe", "muse-glimmer"):
        heads = 4
    head = width // heads
    per_layer = [0 if i == 1 else heads for i in range(layers)]
    keys: dict[str, Any] = {
        "context_length": 256,
        "embedding_length": width,
        "block_count": layers,
        "leading_dense_block_count": 1,
        "feed_forward_length": [0, 0, hidden] if arch.startswith("nemotron_h") else hidden,
        "use_parallel_residual": False,
        "logit_scale": 1.0,
        "time_mix_extra_dim": 64,
        "time_decay_extra_dim": 128,
        "full_attention_interval": 2,
        "attention.head_count": per_layer if arch in _HYBRID else heads,
        "attention.head_count_kv": per_layer if arch in _HYBRID else heads,
        "attention.max_alibi_bias": 8.0,
        "attention.clamp_kqv": 1.0,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.group_norm_epsilon": 1e-5,
        "attention.group_norm_groups": 8,
        "attention.q_lora_rank": 512,
        "attention.kv_lora_rank": 512,
        "attention.sliding_window": 32,
        "attention.sliding_window_pattern": [i % 2 for i in range(layers)]
        if arch in _PATTERNS
        else 5
        if arch == "gemma4"
        else 2,
        "attention.indexer.head_count": heads if arch == "minimax-m3" else 64,
        "attention.indexer.key_length": head if arch == "qwen4exp" else 128,
        "attention.indexer.top_k": 131072,
        "attention.indexer.block_size": 4,
        "attention.indexer.local_blocks": 1,
        "attention.indexer.kpool": 4,
        "attention.indexer.kpool_select_tail": True,
        "rope.dimension_sections": [8, 12, 12, 0] if arch == "bailingmoe3" else [head // 4] * 4,
        "ssm.inner_size": 256 if arch in ("qwen3next", "qwen35", "qwen35moe", "qwen4exp") else 2 * width,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 128,
        "ssm.time_step_rank": heads,
        "ssm.group_count": 0 if arch == "plamo2" else 2,
        "kda.head_dim": 128,
        "kda.safe_gate": True,
        "kda.gate_lower_bound": -5.0,
        "attn_res.block_size": 12,
        "activation.situ_beta": 4.0,
        "activation.situ_linear_beta": 25.0,
        "wkv.head_size": head,
        "shortconv.l_cache": 3,
        "residual_scale": 3.5,
        "attention.decay_lora_rank": 64,
        "attention.iclr_lora_rank": 64,
        "attention.value_residual_mix_lora_rank": 32,
        "attention.gate_lora_rank": 64,
    }
    keys |= _special(arch, layers, head, heads)
    if arch in _LATENT:
        keys |= {
            "attention.head_count_kv": per_layer if arch in _HYBRID else 1,
            "attention.key_length": 512 if arch == "glm5-next" else 576,
            "attention.value_length": 512,
            "rope.dimension_count": 0 if arch == "glm5-next" else 64,
            "attention.key_length_mla": 192,
            "attention.value_length_mla": 128,
        }
    if arch == "gemma4":
        keys |= {
            "embedding_length_per_layer_input": width // 2,
            "attention.shared_kv_layers": 0,
            "attention.key_length_swa": head,
            "attention.value_length_swa": head,
            "rope.freq_base_swa": 10000.0,
        }
    if arch in ENCODERS:
        keys |= {"attention.causal": False, "pooling_type": 1}
    if arch in _MIXTURES:
        keys |= {
            "expert_feed_forward_length": hidden,
            "expert_shared_feed_forward_length": hidden // 2,
            "expert_latent_length": hidden,
            "interleave_moe_layer_step": 2,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_shared_count": 1,
            "expert_gating_func": 4 if arch == "deepseek4" else 2,
            "moe_every_n_layers": 2,
            "expert_group_scale": 1.0,
            "experts_per_group": 1,
        }
    made = [Key("general.architecture", STRING, arch)]
    for name, value in keys.items():
        full = f"{arch}.{name}"
        if isinstance(value, list):
            made.append(Key(full, ARRAY, value, I32))
        else:
            made.append(Key(full, {bool: BOOL, int: U32, float: F32}[type(value)], value))
    made += [
        Key(f"xielu.{name}", F32, value)
        for name, value in (("alpha_n", 1.0), ("alpha_p", 1.0), ("beta", 1.0), ("eps", 1e-7))
    ]
    tokens = [chr(256 + i) for i in range(VOCABULARY)]
    made += [
        Key("tokenizer.ggml.model", STRING, "gpt2"),
        Key("tokenizer.ggml.pre", STRING, "default"),
        strings("tokenizer.ggml.tokens", tokens),
        Key("tokenizer.ggml.token_type", ARRAY, [1] * VOCABULARY, I32),
        strings("tokenizer.ggml.merges", [f"{tokens[0]} {tokens[1]}"]),
        Key("tokenizer.ggml.bos_token_id", U32, 1),
        Key("tokenizer.ggml.eos_token_id", U32, 2),
        Key("tokenizer.ggml.token_type_count", U32, 2),
    ]
    return File(tuple(made))


class _NoAlloc(ctypes.Structure):  # struct gguf_init_params
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def tensors_of_llama_cpp(path: Path) -> list[Weight]:
    """The tensors llama.cpp makes for a header without any. Raises `ModelUnsupported`."""
    lib = ctypes.CDLL(str(Path(api.__file__).parent / "lib" / "libllama.so"))
    lib.gguf_init_from_file.restype = ctypes.c_void_p
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, _NoAlloc]
    lib.gguf_free.argtypes = [ctypes.c_void_p]
    set_data = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(lambda _tensor, _user: None)
    params = llama._model_params()
    lib.llama_model_init_from_user.restype = ctypes.c_void_p
    lib.llama_model_init_from_user.argtypes = [ctypes.c_void_p, type(set_data), ctypes.c_void_p, type(params)]
    tensor_map = lib["_Z29llama_internal_get_tensor_mapB5cxx11PK11llama_model"]
    tensor_map.restype, tensor_map.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    lib.llama_model_free.argtypes = [ctypes.c_void_p]

    metadata = lib.gguf_init_from_file(str(path).encode(), _NoAlloc(True, None))
    model = lib.llama_model_init_from_user(metadata, set_data, None, params)
    if not model:
        raise ModelUnsupported(f"llama.cpp makes none: {' / '.join(llama._errors)}")
    found: dict[str, Weight] = {}  # some are in the list once for each layer
    begin, end = struct.unpack("<QQ", ctypes.string_at(tensor_map(model), 16))  # std::vector
    for at in range(begin, end, 40):  # std::pair<std::string, ggml_tensor *>
        text, length, _, _, tensor = struct.unpack("<5Q", ctypes.string_at(at, 40))
        name = ctypes.string_at(text, length).decode()
        shape = list(struct.unpack("<4q", ctypes.string_at(tensor + 16, 32)))  # ggml_tensor.ne
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        found.setdefault(name, Weight(name, tuple(shape)))
    lib.llama_model_free(model)
    lib.gguf_free(metadata)
    return list(found.values())


def compare(arch: str, directory: Path) -> str:
    """`equal`, or what is wrong."""
    path = directory / f"{arch}.gguf"
    keys = header(arch)
    path.write_bytes(keys.to_bytes())
    opener = Opener(directory)
    try:
        weights = tensors_of_llama_cpp(path)
        path.write_bytes(with_weights(File(keys.keys, tuple(weights)), "F32", 0).to_bytes())
        if arch in ENCODERS:
            return _compare_embeddings(path, opener)
        with plain(path) as other:
            expected = other.greedy(PROMPT, 3)
        if not all(np.isfinite(logits).all() for logits in expected.logits):
            return "not finite"
        model = opener.open(path).model
        for _ in range(2):
            if sealed_greedy(model, PROMPT, 3) != expected:
                return "different"
            forget(model)
    except FlexServeError as error:
        return f"{error.code}: {error.message}"
    finally:
        opener.close()
        for file in directory.iterdir():
            file.unlink()
    return "equal"


def _compare_embeddings(path: Path, opener: Opener) -> str:
    other = PlainEmbedder(path)
    expected = packed(other(PROMPT))
    other.close()
    model = opener.open(path).model
    for _ in range(2):
        if answer(model, request(token_ids=tuple(PROMPT), embed=True)).embedding != expected:
            return "different"
        forget(model)
    return "equal"


def main() -> None:
    """A line with an architecture in, a line with the outcome out. May die, which is an outcome too."""
    os.environ["GGML_NO_BACKTRACE"] = "1"
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    llama.start()
    for line in sys.stdin:
        signal.alarm(60)
        print(compare(line.strip(), Path(sys.argv[1])).replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
