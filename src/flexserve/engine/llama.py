"""llama.cpp through its Python binding's low-level functions: model, context, sampler, vocabulary.

Knows ctypes and llama.cpp's rules; knows nothing of sealing or of the arena but the buffer type it is given.
Everything that computes releases the interpreter lock. Errors are `EngineFailure`.
"""

from __future__ import annotations

import ctypes
import re
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import llama_cpp as api

from ..core import Sampling
from ..errors import EngineFailure, InvalidRequest, ModelUnsupported
from ..flexmem import ggml, repack
from ..sealed.session_file import Tokens
from .spans import ControlToken, ControlTokens
from .threads import BoundThreads, bind

BATCH_TOKENS = 512  # llama.cpp's logical and physical batch: batch boundaries matter for bit equality
PENALTY_TOKENS = 64
MAX_PIECE_BYTES = 1 << 16
# Some pre-tokenizers are std::regex programs, which recurse for every character of a match, and no match
# reaches from a word over white space into the next word: so this bounds the stack that tokenising takes.
MAX_RUN_CHARS = 300_000
STACK_BYTES = 256 << 20  # for the thread that tokenises: 360 bytes per character, of a word and a blank run

_CONTROL = api.LLAMA_TOKEN_ATTR_CONTROL | api.LLAMA_TOKEN_ATTR_UNKNOWN
_TAG = re.compile(r"[<\[]\S+[>\]]")  # <think>, <|start|>, [INST]: no runs of blanks, no words
_RUNS = re.compile(r"\s+|\S+")
_errors: deque[str] = deque(maxlen=4)
_LOG_LEVEL_ERROR = 4


@api.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _user: Any) -> None:
    """Keep llama.cpp's errors for our message; print nothing, since its log names parts of the model."""
    if level == _LOG_LEVEL_ERROR:
        _errors.append(text.decode("utf-8", "replace").strip()[:300])


def start() -> None:
    """Initialise llama.cpp once per process and check our C part against it. Raises `EngineIncompatible`."""
    api.llama_log_set(_on_log, ctypes.c_void_p(0))
    ggml.self_test()
    api.llama_backend_init()


def _why() -> str:
    return _errors[-1] if _errors else "llama.cpp gave no reason"


class _Override(ctypes.Structure):  # struct llama_model_tensor_buft_override
    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


class Model:
    """A loaded llama.cpp model: weights somewhere, vocabulary and hyperparameters."""

    def __init__(self, handle: Any) -> None:
        """Use `from_skeleton` or `from_file`."""
        self.handle = handle
        self.vocab = Vocabulary(api.llama_model_get_vocab(handle))
        self.context_tokens = int(api.llama_model_n_ctx_train(handle))

    @property
    def keeps_state(self) -> bool:
        """Whether what it remembers cannot be shortened: a running state (Mamba and hybrids), or a sliding window,
        whose older tokens llama.cpp overwrites once a state was restored."""
        running = api.llama_model_is_recurrent(self.handle) or api.llama_model_is_hybrid(self.handle)
        return bool(running or api.llama_model_n_swa(self.handle) > 0)

    @classmethod
    def from_skeleton(
        cls, header: bytes, size: int, buffer_type: ggml.ArenaBufferType, *, repacked: bool = False
    ) -> Model:
        """Load a model whose weights arrive later, in the arena behind `buffer_type`.

        `header`: an authentic and validated GGUF header; `size`: the whole GGUF's bytes. `repacked`: the weights
        are in execution layout; llama.cpp then asks for each tensor in the layout of its choice.
        Raises `ModelUnsupported` with llama.cpp's reason.
        """
        overrides = (_Override * 2)(_Override(b".*", buffer_type.handle), _Override(None, None))
        params = _model_params()
        params.load_mode = api.LLAMA_LOAD_MODE_NONE
        _errors.clear()
        with ExitStack() as stack:
            if repacked:
                params.use_extra_bufts = True
                stack.enter_context(buffer_type.redirected(stack.enter_context(repack.donor())))
            else:
                params.tensor_buft_overrides = ctypes.addressof(overrides)
            skeleton = stack.enter_context(ggml.Skeleton(header, size))
            handle = api.llama_model_load_from_file_ptr(skeleton.file, params)
        if not handle:
            raise ModelUnsupported(f"llama.cpp cannot load this model: {_why()}")
        buffer_type.loaded()
        return cls(handle)

    @classmethod
    def from_file(cls, path: Path, *, load_mode: int, repack: bool = False) -> Model:
        """Load a plain GGUF, the way llama.cpp does by itself: the other side of tests and benchmarks."""
        params = _model_params()
        params.load_mode = load_mode
        params.use_extra_bufts = repack
        _errors.clear()
        handle = api.llama_model_load_from_file(str(path).encode(), params)
        if not handle:
            raise ModelUnsupported(f"llama.cpp cannot load {path}: {_why()}")
        return cls(handle)

    def add_adapter(self, gguf: bytearray) -> Any:
        """Load a LoRA adapter that was checked and fits (adapter_rules.py), before any context is made. It lives as
        long as the model. `gguf`, the whole file, is zeroed. Raises `ModelUnsupported` with llama.cpp's reason."""
        _errors.clear()
        with ggml.giving_back(), ggml.Skeleton(gguf, len(gguf)) as file:
            handle = api.llama_adapter_lora_init_from_file_ptr(self.handle, file.file)
        if not handle:
            raise ModelUnsupported(f"llama.cpp cannot load this adapter: {_why()}")
        return handle

    def close(self) -> None:
        if self.handle:
            api.llama_model_free(self.handle)
            self.handle = None


def _model_params() -> Any:
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False  # no repacking: weights stay in the layout they are sealed in
    params.lazy_mode = api.LLAMA_LAZY_MODE_OFF
    return params


class Vocabulary:
    """A model's tokens."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.size = int(api.llama_vocab_n_tokens(handle))
        self._piece = ctypes.create_string_buffer(MAX_PIECE_BYTES)

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`; `add_special` adds what the model wants at the beginning (BOS).

        Where `parse_special` is off, text that looks like a control token stays text. Call it in a thread with
        STACK_BYTES of stack. Raises `InvalidRequest` for a run of more than MAX_RUN_CHARS.
        """
        if len(text) > MAX_RUN_CHARS:
            for run in _RUNS.finditer(text):
                if run.end() - run.start() > MAX_RUN_CHARS:
                    what = "white space" if text[run.start()].isspace() else "text without white space"
                    raise InvalidRequest(
                        f"the prompt has more than {MAX_RUN_CHARS} characters of {what} in a row"
                    )
        data = text.encode("utf-8", "surrogatepass")
        room = len(data) + 16
        for _ in range(2):
            out = (api.llama_token * room)()
            count = api.llama_tokenize(self._handle, data, len(data), out, room, add_special, parse_special)
            if count >= 0:
                return list(out[:count])
            room = -count
        raise EngineFailure("llama.cpp could not tokenise the prompt")

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for in text; empty for control tokens."""
        count = api.llama_token_to_piece(self._handle, token, self._piece, MAX_PIECE_BYTES, 0, False)
        return self._piece.raw[:count] if count > 0 else b""

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""
        return bool(api.llama_vocab_is_eog(self._handle, token))

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """What only a template may write: control tokens, and user-defined ones that are no ordinary text."""
        control, reserved = [], []
        for token in range(self.size):
            attr = api.llama_vocab_get_attr(self._handle, token)
            if attr & _CONTROL:
                lstrip, rstrip = attr & api.LLAMA_TOKEN_ATTR_LSTRIP, attr & api.LLAMA_TOKEN_ATTR_RSTRIP
                control.append(ControlToken(self.text_of(token), bool(lstrip), bool(rstrip)))
            elif attr & api.LLAMA_TOKEN_ATTR_USER_DEFINED and _TAG.search(text := self.text_of(token)):
                reserved.append(text)
        return ControlTokens(control, reserved)

    def text_of(self, token: int) -> str:
        """The token's own text (control tokens have one too); empty for none."""
        if token < 0:
            return ""
        return (api.llama_vocab_get_text(self._handle, token) or b"").decode("utf-8", "replace")

    @property
    def bos(self) -> int:
        return int(api.llama_vocab_bos(self._handle))

    @property
    def bos_text(self) -> str:
        return self.text_of(self.bos)

    @property
    def eos_text(self) -> str:
        return self.text_of(api.llama_vocab_eos(self._handle))

    @property
    def adds_bos(self) -> bool:
        return bool(api.llama_vocab_get_add_bos(self._handle))


@dataclass(frozen=True)
class ContextOptions:
    """How much context, and how many threads compute."""

    context_tokens: int
    threads: int
    embeddings: bool = False  # make embeddings, as the model's pooling says, instead of logits
    bind_threads: bool = (
        True  # each thread to a processor of its own, where that helps; off: as llama.cpp places them
    )
    gives_back: bool = False  # memory of what is forgotten goes back to the kernel at once, zeroed


class Context:
    """A KV cache for one sequence, and compute on it. One thread at a time."""

    def __init__(self, model: Model, options: ContextOptions) -> None:
        params = api.llama_context_default_params()
        params.n_ctx = options.context_tokens
        # Pooling, and attention in both directions, want all tokens of a text in one batch.
        batch = options.context_tokens if options.embeddings else min(BATCH_TOKENS, options.context_tokens)
        params.n_batch = params.n_ubatch = batch
        params.n_seq_max = 1
        # Logits for one position: a full batch of them would take 250 MB at 128k tokens.
        params.n_outputs_max = batch if options.embeddings else 1
        params.embeddings = options.embeddings
        self.batch_tokens = batch
        params.n_threads = params.n_threads_batch = options.threads
        params.no_perf = True
        self.stop = ggml.AbortFlag()
        params.abort_callback = ctypes.cast(self.stop.callback, type(params.abort_callback))
        params.abort_callback_data = self.stop.address
        _errors.clear()
        self._model = model
        with ggml.giving_back() if options.gives_back else nullcontext():
            self.handle = api.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise ModelUnsupported(
                f"llama.cpp cannot make a context of {options.context_tokens} tokens: {_why()}"
            )
        self._threads: BoundThreads | None = (
            bind(self.handle, options.threads) if options.bind_threads else None
        )
        self.context_tokens = int(api.llama_n_ctx(self.handle))
        self.tokens: list[int] = []  # that it remembers
        self.batches: list[int] = []  # how many of them were computed at once, in order

    def use_adapter(self, adapter: Any, scale: float) -> None:
        """Compute with an adapter of the model from now on: `scale` times what it adds."""
        adapters = (api.llama_adapter_lora_p_ctypes * 1)(adapter)
        if api.llama_set_adapters_lora(self.handle, adapters, 1, (ctypes.c_float * 1)(scale)) != 0:
            raise EngineFailure("llama.cpp does not apply the adapter")

    @property
    def used(self) -> int:
        return len(self.tokens)

    def clear(self) -> None:
        """Forget every token, and zero their keys and values."""
        api.llama_memory_clear(api.llama_get_memory(self.handle), True)
        self.tokens.clear()
        self.batches.clear()

    def is_whole(self) -> bool:
        """Whether llama.cpp remembers exactly `tokens`: after a cancelled decode it might not."""
        last = api.llama_memory_seq_pos_max(api.llama_get_memory(self.handle), 0)
        return 0 < self.used == int(last) + 1

    def state_bytes(self) -> int:
        """The size of what `get_state` writes."""
        return int(api.llama_state_seq_get_size(self.handle, 0))

    def get_state(self, address: int, size: int) -> bool:
        """Copy the state to `address`, where there are `size` bytes (`state_bytes`). False when llama.cpp cannot."""
        to = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
        return int(api.llama_state_seq_get_data(self.handle, to, size, 0)) == size

    def set_state(self, address: int, size: int, tokens: Tokens, count: int) -> bool:
        """Become as after the first `count` of these tokens, where a batch ended; from bytes that `get_state` wrote
        and nobody else did: llama.cpp believes them. False, and then it is as after `clear`, when they do not fit."""
        self.clear()
        memory = api.llama_get_memory(self.handle)
        whole = tokens.ids.tolist()
        if len(whole) > self.context_tokens:
            return False
        source = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
        done = int(api.llama_state_seq_set_data(self.handle, source, size, 0)) == size
        self.tokens = whole
        if not (done and self.is_whole()):
            self.clear()
            return False
        if count < len(whole) and not api.llama_memory_seq_rm(memory, 0, count, -1):
            self.clear()
            return False
        self.tokens = whole[:count]
        ends = list(accumulate(tokens.batches))
        self.batches = list(tokens.batches[: ends.index(count) + 1])
        return True

    def decode(self, tokens: Sequence[int]) -> bool:
        """Put tokens behind those already there, in batches of BATCH_TOKENS (for embeddings, all at once); logits are
        those of the last.

        Returns False when `stop` was set meanwhile. Raises `EngineFailure`.
        """
        for at in range(0, len(tokens), self.batch_tokens):
            part = tokens[at : at + self.batch_tokens]
            array = (api.llama_token * len(part))(*part)
            status = api.llama_decode(self.handle, api.llama_batch_get_one(array, len(part)))
            if status == 2:
                return False
            if status != 0:
                raise EngineFailure(f"llama.cpp could not decode (status {status}): {_why()}")
            self.tokens += part
            self.batches.append(len(part))
        return True

    def logits(self) -> Any:
        """The last position's logits, a float32 array of the vocabulary's size; valid until the next decode."""
        import numpy as np

        pointer = api.llama_get_logits_ith(self.handle, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._model.vocab.size,))

    def embedding(self) -> Any:
        """The pooled vector of all tokens, float32, as llama.cpp computed it.

        Raises `EngineFailure`.
        """
        import numpy as np

        pointer = api.llama_get_embeddings_seq(self.handle, 0)
        if not pointer:
            raise EngineFailure("llama.cpp made no embedding")
        # Not np.ctypeslib: it is imported when first used, and a confined process can import nothing any more.
        length = int(api.llama_model_n_embd_out(self._model.handle))
        return np.frombuffer(ctypes.string_at(pointer, 4 * length), np.float32)

    def close(self) -> None:
        if self.handle:
            self.clear()
            api.llama_free(self.handle)
            self.handle = None
            if self._threads:
                self._threads.close()


class Sampler:
    """Chooses the next token from a context's last logits (llama.cpp's sampler chain)."""

    def __init__(self, sampling: Sampling, seed: int, vocabulary: int) -> None:
        """`vocabulary`: the model's number of tokens."""
        self._chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())

        def add(sampler: Any) -> None:
            api.llama_sampler_chain_add(self._chain, sampler)

        if sampling.repeat_penalty != 1.0:
            add(
                api.llama_sampler_init_penalties(
                    vocabulary, PENALTY_TOKENS, sampling.repeat_penalty, 0.0, 0.0
                )
            )
        if sampling.temperature == 0:
            add(api.llama_sampler_init_greedy())
            return
        if sampling.top_k:
            add(api.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1:
            add(api.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p:
            add(api.llama_sampler_init_min_p(sampling.min_p, 1))
        add(api.llama_sampler_init_temp(sampling.temperature))
        add(api.llama_sampler_init_dist(seed))

    def sample(self, context: Context) -> int:
        """The next token; it counts for the penalties of those after it."""
        return int(api.llama_sampler_sample(self._chain, context.handle, -1))

    def accept(self, tokens: Sequence[int]) -> None:
        """Let prompt tokens count for the repeat penalty."""
        for token in tokens[-PENALTY_TOKENS:]:
            api.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        api.llama_sampler_free(self._chain)


def check_tokens(tokens: Sequence[int], vocab: Vocabulary) -> None:
    """Raises `InvalidRequest` for a token id the model does not have (llama.cpp would read past its end)."""
    for token in tokens:
        if not 0 <= token < vocab.size:
            raise InvalidRequest(f"token id {token} is not in the vocabulary of {vocab.size}")
