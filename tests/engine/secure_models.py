"""Sealed models opened in this process, as the secure world opens them, and plain llama.cpp beside them."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from flexserve.bench.generate import write_model
from flexserve.bench.shapes import ModelShape
from flexserve.core import PAGE_SIZE, Finished, Request, Sampling, Token
from flexserve.engine.adapter import SealedAdapter
from flexserve.engine.llama import Context, ContextOptions, Model, Sampler
from flexserve.engine.model import EngineOptions, SecureModel
from flexserve.engine.sessions import SessionStore
from flexserve.engine.template import TemplateZygote
from flexserve.flexmem.arena import SegmentState
from flexserve.flexmem.uffd import MADV_DONTNEED, advise
from flexserve.sealed.keys import VendorKey
from flexserve.sealed.reader import SealedModel
from flexserve.sealed.seal import seal

from ..sealed_fixtures import model_key

THREADS = 1  # more wait for each other in busy loops, which takes very long beside other programs
CONTEXT_TOKENS = 1024
GREEDY = Sampling(temperature=0)
Logits = npt.NDArray[np.float32]
_ids = itertools.count()


@dataclass
class Opened:
    """A model in a secure world's engine, and its files."""

    model: SecureModel
    gguf: Path
    flex: Path
    descriptors: list[int]

    def close(self) -> None:
        self.model.close()
        for fd in self.descriptors:
            os.close(fd)


class Opener:
    """Makes, seals and opens models in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._vendor = VendorKey.generate()
        self._opened: list[Opened] = []
        self._names = itertools.count()
        self._adapters: list[int] = []

    def generate(self, shape: ModelShape, quant: str, seed: int = 0) -> Path:
        path = self._directory / f"{shape.name}-{quant}-{seed}.gguf"
        if not path.exists():
            write_model(shape, quant, path, seed)
        return path

    def open(
        self,
        gguf: Path,
        *,
        sessions: SessionStore | None = None,
        adapter: Path | None = None,
        scale: float = 1.0,
        damage: Callable[[bytearray], None] = lambda _: None,
        **options: Any,
    ) -> Opened:
        """Seal a GGUF and open it; no weight is resident. An `adapter` is a GGUF too; `damage` its sealed form."""
        flex = self._directory / f"{gguf.stem}-{next(self._names)}.flex"
        seal(gguf, flex, self._vendor)
        descriptors = [os.open(flex, os.O_RDONLY), os.open(flex, os.O_RDONLY | os.O_DIRECT)]
        sealed = SealedModel.open(descriptors[0], [self._vendor.public])
        model = SecureModel(
            gguf.stem,
            sealed.unlock(model_key(flex, self._vendor)),
            cached=descriptors[0],
            direct=descriptors[1],
            zygote=TemplateZygote(),  # not started: these tests render no template
            options=EngineOptions(**{"threads": THREADS, "context_tokens": CONTEXT_TOKENS, **options}),
            sessions=sessions,
            adapter=None if adapter is None else self.seal_adapter(adapter, scale, damage),
        )
        self._opened.append(opened := Opened(model, gguf, flex, descriptors))
        return opened

    def seal_adapter(
        self, gguf: Path, scale: float = 1.0, damage: Callable[[bytearray], None] = lambda _: None
    ) -> SealedAdapter:
        """Seal an adapter and unlock it."""
        flex = self._directory / f"adapter-{next(self._names)}.flex"
        seal(gguf, flex, self._vendor)
        data = bytearray(flex.read_bytes())
        damage(data)
        flex.write_bytes(data)
        self._adapters.append(os.open(flex, os.O_RDONLY))
        sealed = SealedModel.open(self._adapters[-1], [self._vendor.public])
        return SealedAdapter(sealed.unlock(model_key(flex, self._vendor)), scale)

    def discard(self, opened: Opened) -> None:
        """Close a model before the end, where many are opened."""
        self._opened.remove(opened)
        opened.close()
        opened.flex.unlink()

    def close(self) -> None:
        for opened in self._opened:
            opened.close()
        for fd in self._adapters:
            os.close(fd)


@dataclass
class Trace:
    """What an answer was made of: tokens, and the logits each was chosen from."""

    tokens: list[int] = field(default_factory=list)
    logits: list[Logits] = field(default_factory=list)

    def __eq__(self, other: object) -> bool:
        """Bit for bit."""
        assert isinstance(other, Trace)
        return self.tokens == other.tokens and all(
            np.array_equal(a.view(np.uint32), b.view(np.uint32))
            for a, b in zip(self.logits, other.logits, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]


class Plain:
    """llama.cpp by itself, from the plain file: the same threads and batches, no repacking unless asked for."""

    def __init__(
        self,
        gguf: Path,
        load_mode: int = llama_cpp.LLAMA_LOAD_MODE_NONE,
        threads: int = THREADS,
        repack: bool = False,
    ) -> None:
        self.model = Model.from_file(gguf, load_mode=load_mode, repack=repack)
        self._context = Context(self.model, ContextOptions(CONTEXT_TOKENS, threads))

    def use_adapter(self, path: Path, scale: float) -> None:
        """Read a LoRA adapter from its plain file, and compute with it from now on."""
        handle = llama_cpp.llama_adapter_lora_init(self.model.handle, str(path).encode())
        assert handle
        self._context.use_adapter(handle, scale)

    def greedy(self, prompt: Sequence[int], count: int, batches: Sequence[int] = ()) -> Trace:
        """`batches`: how many of the prompt's first tokens are computed at once, each time; the rest as ever."""
        trace = Trace()
        sampler = Sampler(GREEDY, 0, self.model.vocab.size)
        self._context.clear()
        tokens = list(prompt)
        for batch in batches:
            assert self._context.decode(tokens[:batch])
            del tokens[:batch]
        for _ in range(count):
            assert self._context.decode(tokens)
            trace.logits.append(self._context.logits().copy())
            tokens = [sampler.sample(self._context)]
            trace.tokens += tokens
        sampler.close()
        return trace

    def close(self) -> None:
        self._context.close()
        self.model.close()


@contextmanager
def plain(gguf: Path, **options: Any) -> Iterator[Plain]:
    made = Plain(gguf, **options)
    try:
        yield made
    finally:
        made.close()


def request(**fields: Any) -> Request:
    return Request(**{"id": f"r{next(_ids)}", "model": "m", "sampling": GREEDY, "ignore_eos": True, **fields})


def answer(
    model: SecureModel,
    asked: Request,
    emit: Callable[[Token], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Finished:
    return model.answer(asked, emit, cancelled, time.perf_counter())


def settle(model: SecureModel) -> None:
    """Wait for loads that the last answer did not need any more: a recall passes over what is on its way."""
    assert model._loader
    model._loader.wait()


def forget(model: SecureModel) -> None:
    """Recall everything."""
    settle(model)
    model.recall(1 << 40)
    assert model.resident_bytes == model.arena.resident_pages() == 0


def sealed_greedy(model: SecureModel, prompt: Sequence[int], count: int) -> Trace:
    """The same as `Plain.greedy`, from the sealed model and through its public way of answering."""
    trace = Trace()

    def note(token: Token) -> None:
        assert model._context
        trace.tokens.append(token.id)
        trace.logits.append(model._context.logits().copy())

    finished = answer(model, request(token_ids=tuple(prompt), max_tokens=count), note)
    assert list(finished.token_ids) == trace.tokens
    return trace


@contextmanager
def storm(model: SecureModel, seed: int) -> Iterator[None]:
    """Recalls and losses of random segments, as fast as a thread can, while a model answers."""
    arena = model.arena
    rng = random.Random(seed)
    calm = threading.Event()
    everything = [i for r in arena.regions for i in range(r.first_segment, r.first_segment + r.segment_count)]

    def blow() -> None:
        while not calm.wait(0.0005):
            some = rng.sample(everything, min(len(everything), 3))
            if rng.randrange(2):
                arena.recall(some)
                continue
            arena.lazy(some)
            for index in some:
                if arena.state(index) == SegmentState.LAZY:  # as the kernel would, a page of it
                    span = arena.span(index)
                    at = span.offset + PAGE_SIZE * rng.randrange(span.length // PAGE_SIZE)
                    advise(arena.base + at, PAGE_SIZE, MADV_DONTNEED)

    thread = threading.Thread(target=blow, name="storm", daemon=True)
    thread.start()
    try:
        yield
    finally:
        calm.set()
        thread.join()
