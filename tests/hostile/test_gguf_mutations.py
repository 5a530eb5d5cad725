"""Attack: a trusted vendor's authentic file with anything at all changed in it. Every mutant is either refused
by our rules or by llama.cpp, or it can be used without harm; llama.cpp itself is the judge."""

from __future__ import annotations

import contextlib
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flexserve.errors import FlexServeError
from flexserve.sealed.gguf import check_model, describe, parse_header
from flexserve.sealed.layout import plan_layout
from flexserve.sealed.model_rules import DENSE, REVIEWED

from ..architectures import NARROW, case_of
from ..sealed.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    File,
    Key,
    Weight,
    tiny_model,
)

ARCHITECTURES = sorted(REVIEWED)
NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    15,
    16,
    17,
    32,
    63,
    64,
    65,
    96,
    128,
    255,
    256,
    300,
    512,
    513,
    4096,
    65535,
    65536,
)
BIG = (1 << 20, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-5, 1e-38, 1e38, math.inf, -math.inf, math.nan)
KEYS = """block_count context_length embedding_length feed_forward_length attention.head_count
    attention.head_count_kv attention.key_length attention.value_length rope.dimension_count
    attention.sliding_window attention.sliding_window_pattern expert_count expert_used_count expert_group_count
    expert_group_used_count expert_gating_func expert_shared_count expert_feed_forward_length pooling_type
    nextn_predict_layers embedding_length_out attention.key_length_swa attention.value_length_swa
    rope.dimension_count_swa vocab_size rope.scaling.original_context_length leading_dense_block_count
    attention.key_length_mla attention.value_length_mla attention.causal use_parallel_residual
    attention.layer_norm_epsilon attention.layer_norm_rms_epsilon rope.freq_base rope.freq_base_swa
    rope.scaling.factor rope.scale_linear rope.scaling.attn_factor rope.scaling.yarn_log_multiplier
    rope.scaling.yarn_ext_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
    attn_logit_softcapping final_logit_softcapping attention.scale logit_scale residual_scale embedding_scale
    attention.max_alibi_bias attention.clamp_kqv rope.scaling.type rope.scaling.finetuned tensor_data_layout"""
FAMILY_KEYS = {
    "deepseek2": """attention.kv_lora_rank attention.q_lora_rank attention.key_length_mla block_count
        attention.value_length_mla attention.key_length attention.value_length rope.dimension_count
        attention.head_count_kv leading_dense_block_count expert_shared_count expert_feed_forward_length
        expert_gating_func expert_weights_scale expert_weights_norm attention.temperature_scale
        attention.temperature_length expert_group_count expert_group_used_count""",
    "qwen3moe": """expert_count expert_used_count expert_feed_forward_length expert_gating_func expert_group_count
        expert_group_used_count feed_forward_length""",
    "mamba": "ssm.conv_kernel ssm.inner_size ssm.state_size ssm.time_step_rank ssm.dt_b_c_rms ssm.group_count",
    "mamba2": "ssm.conv_kernel ssm.inner_size ssm.state_size ssm.time_step_rank ssm.group_count",
    "bert": "attention.causal pooling_type context_length attention.layer_norm_epsilon classifier.output_labels",
    "nomic-bert": "attention.causal pooling_type rope.dimension_count moe_every_n_layers attention.head_count_kv",
}  # what each family has besides: changed as often as the keys that all have
TOKENIZER_KEYS = """model pre tokens scores token_type merges bos_token_id eos_token_id eot_token_id unknown_token_id
    padding_token_id seperator_token_id add_bos_token add_eos_token add_sep_token add_space_prefix
    remove_extra_whitespaces precompiled_charsmap token_type_count suppress_tokens"""
TENSORS = """token_embd.weight output.weight output.bias output_norm.weight output_norm.bias rope_freqs.weight
    rope_factors_long.weight rope_factors_short.weight cls.output.weight cls.weight dense_2.weight
    blk.0.attn_q.bias blk.0.attn_k.bias blk.0.attn_v.bias blk.0.attn_output.bias blk.0.attn_qkv.weight
    blk.0.attn_qkv.bias blk.0.attn_q_norm.weight blk.0.attn_k_norm.weight blk.0.attn_norm.bias
    blk.0.ffn_gate.bias blk.0.ffn_up.bias blk.0.ffn_down.bias blk.0.ffn_gate_inp.weight
    blk.0.ffn_gate_exps.weight blk.0.ffn_up_exps.weight blk.0.ffn_down_exps.weight blk.0.attn_q.scale
    blk.0.attn_output.scale blk.0.ffn_down.scale blk.0.post_attention_norm.weight blk.0.post_ffw_norm.weight
    blk.0.attn_q.weight blk.0.attn_k.weight blk.0.attn_v.weight blk.0.attn_output.weight blk.0.ffn_norm.weight
    blk.0.ffn_gate.weight blk.0.ffn_up.weight blk.0.ffn_down.weight blk.1.attn_q.weight output.scale"""
PRES = (
    "default",
    "llama-bpe",
    "qwen2",
    "gpt-2",
    "gemma4",
    "kimi-k2",
    "nonsense",
    "",
    "deepseek-llm",
    "tekken",
)


TEMPLATE = "{{ messages[0].content }}"


def whole_model(arch: str) -> File:
    """The tiny model with what its architecture needs besides."""
    if arch not in DENSE:
        return case_of(arch).make(NARROW).with_key("tokenizer.chat_template", STRING, TEMPLATE)
    file = tiny_model(arch, layers=2, tied=arch in ("gemma", "gemma2"))
    for layer in range(2):
        block = f"blk.{layer}."
        if arch in ("qwen3", "gemma3"):
            file = file.with_weight(Weight(block + "attn_q_norm.weight", (16,)))
            file = file.with_weight(Weight(block + "attn_k_norm.weight", (16,)))
        if arch in ("gemma2", "gemma3"):
            file = file.with_weight(Weight(block + "post_attention_norm.weight", (64,)))
            file = file.with_weight(Weight(block + "post_ffw_norm.weight", (64,)))
        if arch == "phi3":
            file = file.without_weight(block + "ffn_gate.weight").with_weight(
                Weight(block + "ffn_up.weight", (64, 192))
            )
    if arch == "gemma3":
        file = file.with_key("gemma3.attention.sliding_window", U32, 32)
    return file.with_key("tokenizer.ggml.pre", STRING, "default")


def mutate(file: File, arch: str, rng: random.Random) -> File:
    """Change one to three things that matter to llama.cpp."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        file = rng.choice(MUTATIONS)(file, arch, rng)
    return file


def _change_key(file: File, arch: str, rng: random.Random) -> File:
    keys = FAMILY_KEYS.get(arch, KEYS) if rng.randrange(2) else KEYS
    name = f"{arch}.{rng.choice(keys.split())}"
    kind = rng.choice((U32, U32, U32, F32, F32, BOOL, STRING, ARRAY, U16, U64, I32))
    if kind == STRING:
        return file.with_key(name, kind, rng.choice(("none", "linear", "yarn", "longrope", "x", "")))
    if kind == F32:
        return file.with_key(name, kind, rng.choice(FLOATS))
    if kind == BOOL:
        return file.with_key(name, kind, rng.randint(0, 1))
    if kind == ARRAY:
        element = rng.choice((U32, I32, F32, BOOL))
        length = rng.choice((0, 1, 2, 2, 2, 3, 512))
        values = [rng.choice(FLOATS) if element == F32 else rng.choice(NUMBERS[:3]) for _ in range(length)]
        if element in (U32, I32):
            values = [rng.choice(NUMBERS) for _ in range(length)]
        if element == BOOL:
            values = [rng.randint(0, 1) for _ in range(length)]
        return file.with_key(name, kind, values, element)
    limit = {U16: 1 << 16, I32: 1 << 31}.get(kind, 1 << 32)
    return file.with_key(name, kind, rng.choice([n for n in (*NUMBERS, *NUMBERS, *BIG) if n < limit]))


def _nudge_key(file: File, arch: str, rng: random.Random) -> File:
    """An integer the model has, slightly or wildly off."""
    keys = [k for k in file.keys if k.type == U32]
    key = rng.choice(keys)
    value = rng.choice((key.value + 1, key.value - 1, key.value * 2, key.value // 2, rng.choice(NUMBERS)))
    assert isinstance(key.name, str)
    return file.with_key(key.name, U32, value % (1 << 32))


def _drop_key(file: File, arch: str, rng: random.Random) -> File:
    name = rng.choice(file.keys).name
    assert isinstance(name, str)
    return file.without_key(name)


def _change_tokenizer(file: File, arch: str, rng: random.Random) -> File:
    name = "tokenizer.ggml." + (part := rng.choice(TOKENIZER_KEYS.split()))
    tokens = [chr(256 + i) for i in range(300)]
    if part == "model":
        return file.with_key(
            name, STRING, rng.choice(("gpt2", "llama", "bert", "t5", "rwkv", "none", "gemma4", "x"))
        )
    if part == "pre":
        return file.with_key(name, STRING, rng.choice(PRES))
    if part == "tokens":
        for _ in range(rng.randint(1, 20)):
            at = rng.randrange(300)
            tokens[at] = rng.choice(
                ("", "a", "\n", "<|im_end|>", "\x00", f"<0x{at % 256:02X}>", "x" * 300, tokens[at - 1])
            )
        return file.with_key(name, ARRAY, tokens[: rng.choice((300, 300, 300, 299))], STRING)
    if part == "merges":
        pool = ("a b", " a", "a ", "ab", "", "Ā ā", "a b c", " ", "  ")
        return file.with_key(name, ARRAY, [rng.choice(pool) for _ in range(rng.randrange(4))], STRING)
    if part == "scores":
        return file.with_key(name, ARRAY, [rng.choice(FLOATS) for _ in range(rng.choice((300, 299)))], F32)
    if part == "token_type":
        return file.with_key(name, ARRAY, [rng.choice((0, 1, 1, 2, 3, 4, 5, 6, 7)) for _ in range(300)], I32)
    if part in ("precompiled_charsmap", "suppress_tokens"):
        kind = U8 if part.startswith("p") else I32
        return file.with_key(
            name, ARRAY, [rng.choice((0, 1, 255, 200)) for _ in range(rng.randrange(20))], kind
        )
    if part.startswith(("add", "remove")):
        return file.with_key(name, BOOL, rng.randint(0, 1))
    return file.with_key(name, U32, rng.choice((0, 1, 298, 299, 300, (1 << 32) - 1)))


def _change_tensor(file: File, arch: str, rng: random.Random) -> File:
    weight = rng.choice(file.weights)
    action = rng.randrange(4)
    shape = weight.shape
    if action == 0:
        return file.with_weight(
            replace(weight, type=rng.choice((0, 1, 2, 6, 8, 20, 24, 25, 26, 27, 28, 30, 39, 42)))
        )
    if action == 1:
        shape = (*shape, *rng.choice(((1,), (1, 1), (2,), ())))[:4]
    elif action == 2:
        shape = tuple(reversed(shape))
    else:
        at = rng.randrange(len(shape))
        shape = (*shape[:at], max(1, shape[at] + rng.choice((-1, 1, -16, 16, shape[at]))), *shape[at + 1 :])
    return file.with_weight(replace(weight, shape=shape))


def _add_tensor(file: File, arch: str, rng: random.Random) -> File:
    shape = rng.choice(
        ((16,), (8,), (64,), (32,), (1,), (300,), (64, 64), (64, 32), (64, 128), (64, 8), (64, 96, 4))
    )
    return file.with_weight(Weight(rng.choice(TENSORS.split()), shape, rng.choice((0, 0, 1, 8, 26))))


def _drop_tensor(file: File, arch: str, rng: random.Random) -> File:
    name = rng.choice(file.weights).name
    assert isinstance(name, str)
    return file.without_weight(name)


def _experts(file: File, arch: str, rng: random.Random) -> File:
    """Half of a mixture of experts."""
    count = rng.choice((1, 2, 4, 8))
    file = file.with_key(f"{arch}.expert_count", U32, count)
    file = file.with_key(f"{arch}.expert_used_count", U32, rng.choice((1, 2, count, count + 1)))
    for layer in range(2):
        block = f"blk.{layer}."
        for part in ("gate", "up", "down"):
            file = file.without_weight(f"{block}ffn_{part}.weight")
            if rng.random() < 0.95:
                rows = (96, 64) if part == "down" else (64, 96)
                file = file.with_weight(Weight(f"{block}ffn_{part}_exps.weight", (*rows, count)))
        file = file.with_weight(Weight(f"{block}ffn_gate_inp.weight", (64, count)))
    return file


MUTATIONS: tuple[Callable[[File, str, random.Random], File], ...] = (
    _change_key,
    _change_key,
    _nudge_key,
    _drop_key,
    _change_tokenizer,
    _change_tokenizer,
    _change_tensor,
    _add_tensor,
    _drop_tensor,
    _experts,
)


class Victim:
    """The worker, started again when a file killed it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def use(self, path: Path) -> str:
        if self._process is None:
            worker = Path(__file__).with_name("llama_worker.py")
            self._process = subprocess.Popen(
                [sys.executable, str(worker)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(f"{path}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline().strip()
        except BrokenPipeError:
            answer = ""
        if not answer:
            answer = f"killed ({self._process.wait()})"
            self.close()
        return answer

    def close(self) -> None:
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    started = Victim()
    yield started
    started.close()


def accepted(data: bytes) -> bool:
    """Whether our rules let it through; anything but a FlexServeError is our own failure."""
    start = time.process_time()
    try:
        header = parse_header(data, len(data))
        check_model(header)
        describe(header)
        plan_layout(header)
    except FlexServeError:
        return False
    finally:
        assert time.process_time() - start < 5
    return True


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_model_that_is_mutated_is_a_good_one(arch: str, victim: Victim, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data := whole_model(arch).to_bytes())
    assert accepted(data)
    assert victim.use(path) == "used"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_mutant_that_passes_harms_llama_cpp(arch: str, victim: Victim, tmp_path: Path) -> None:
    rng = random.Random(f"mutants of {arch}")
    path = tmp_path / "m.gguf"
    good = whole_model(arch)
    outcomes = {"refused by us": 0, "refused": 0, "used": 0}
    for number in range(80):
        mutant = mutate(good, arch, rng)
        data = mutant.to_bytes()
        if not accepted(data):
            outcomes["refused by us"] += 1
            continue
        path.write_bytes(data)
        outcome = victim.use(path)
        assert outcome in outcomes, f"mutant {number} of {arch}: {outcome}: {differences(good, mutant)}"
        outcomes[outcome] += 1
    assert min(outcomes.values()) > 0, outcomes  # the mutants are neither hopeless nor all harmless


def test_without_our_rules_mutants_do_kill_llama_cpp(victim: Victim, tmp_path: Path) -> None:
    """The control: the judge can tell."""
    rng = random.Random("control")
    path = tmp_path / "m.gguf"
    good = whole_model("llama")
    for _ in range(500):
        data = mutate(good, "llama", rng).to_bytes()
        try:
            parse_header(data, len(data))
        except FlexServeError:
            continue
        if not accepted(data):
            path.write_bytes(data)
            if victim.use(path).startswith("killed"):
                return
    pytest.fail("no mutant did harm")


def differences(good: File, mutant: File) -> list[Key | Weight | str]:
    found: list[Key | Weight | str] = [k for k in mutant.keys if k not in good.keys and len(str(k)) < 5000]
    found += [w for w in mutant.weights if w not in good.weights]
    found += [f"no {k.name!r}" for k in good.keys if k.name not in [m.name for m in mutant.keys]]
    found += [f"no {w.name!r}" for w in good.weights if w.name not in [m.name for m in mutant.weights]]
    return found


def test_flipped_bits_never_raise_anything_but_our_errors() -> None:
    data = whole_model("llama").to_bytes()
    end = parse_header(data, len(data)).data_offset
    rng = random.Random(2)
    for _ in range(2000):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(end)] = rng.randrange(256)
        accepted(bytes(changed[: rng.choice((len(data), len(data), rng.randrange(end)))]))
