"""Attack: a *trusted* vendor seals a model with anything at all wrong in it, correctly signed, and a device uses it.

test_gguf_mutations.py lets llama.cpp judge our rules alone; here the whole path is attacked, in a real secure
world: register, and ask a prompt and a conversation when that works. Every outcome is a clear error or an answer;
the secure world does not crash, hang or grow.
"""

from __future__ import annotations

import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexserve.core import Finished, Message, Request, Sampling
from flexserve.errors import FlexServeError
from flexserve.worlds.base import ModelSource
from flexserve.worlds.linux import LinuxWorld

from ..sealed.gguf_bytes import ARRAY, BOOL, F32, I32, STRING, U32, U64, File, Key, Weight
from ..sealed_fixtures import license_for, seal_unchecked
from ..world_fixtures import Device, linux_world, make_device
from .test_gguf_mutations import ARCHITECTURES, mutate, whole_model

PATIENCE_S = 30.0
GROWTH_BYTES = 500 << 20
BIG = (0, 1, 255, 1 << 16, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 64) - 1)
TEMPLATES = (
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% set x = [1] %}{% for i in range(99) %}{% set x = x + x %}{{ x }}{% endfor %}",
    "{{ messages[0].content * 100000 }}",
    "{" * 10_000,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% for m in messages %}" * 200,
    "",
    "\0",
    "{{ raise_exception('no') }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ (9**9**9) }}",
    "{% if messages[0].content %}x{% endif %}",
    "x" * 300_000,
)

Change = Callable[[File, random.Random], File | bytes]


def _meaning(file: File, rng: random.Random) -> File:
    """What llama.cpp reads: hyperparameters, tokenizer, shapes, experts (test_gguf_mutations.py)."""
    arch = next(k.value for k in file.keys if k.name == "general.architecture")
    return mutate(file, str(arch), rng)


def _counts(file: File, rng: random.Random) -> File:
    if rng.randrange(2):
        return replace(file, key_count=rng.choice(BIG))
    return replace(file, weight_count=rng.choice(BIG))


def _array_length(file: File, rng: random.Random) -> File:
    arrays = [k for k in file.keys if k.type == ARRAY]
    key = rng.choice(arrays)
    changed = replace(key, count=rng.choice((*BIG, len(key.value) - 1, len(key.value) + 1)))
    return replace(file, keys=tuple(changed if k is key else k for k in file.keys))


def _short_array(file: File, rng: random.Random) -> File:
    """Fewer tokens, types or merges than the others, consistently written."""
    key = rng.choice([k for k in file.keys if k.type == ARRAY])
    cut = key.value[: rng.randrange(len(key.value))]
    return replace(file, keys=tuple(replace(k, value=cut) if k is key else k for k in file.keys))


def _value_type(file: File, rng: random.Random) -> File:
    key = rng.choice([k for k in file.keys if k.type in (U32, F32, BOOL)])
    changed = replace(
        key, type=rng.choice((U32, U64, I32, F32, BOOL, 13, 99, (1 << 32) - 1)), value=b"\x01" * 8
    )
    return replace(file, keys=tuple(changed if k is key else k for k in file.keys))


def _huge(file: File, rng: random.Random) -> File:
    key = rng.choice([k for k in file.keys if k.type == U32])
    assert isinstance(key.name, str)
    return file.with_key(key.name, rng.choice((U32, U64)), rng.choice([b for b in BIG if b < 1 << 32]))


def _duplicate(file: File, rng: random.Random) -> File:
    if rng.randrange(2):
        return replace(file, keys=(*file.keys, rng.choice(file.keys)))
    return replace(file, weights=(*file.weights, rng.choice(file.weights)))


def _offset(file: File, rng: random.Random) -> File:
    weight = rng.choice(file.weights)
    moved = replace(weight, offset=rng.choice((*BIG, 32, 64, 33, 1 << 12)))
    return replace(file, weights=tuple(moved if w is weight else w for w in file.weights))


def _shape(file: File, rng: random.Random) -> File:
    weight = rng.choice(file.weights)
    shape = list(weight.shape)
    shape[rng.randrange(len(shape))] = rng.choice(BIG)
    if rng.randrange(3) == 0:
        shape += [rng.choice(BIG)] * rng.randrange(1, 4)
    changed = replace(weight, shape=tuple(shape), nbytes=64)
    return replace(file, weights=tuple(changed if w is weight else w for w in file.weights))


def _type(file: File, rng: random.Random) -> File:
    weight = rng.choice(file.weights)
    changed = replace(weight, type=rng.choice((4, 5, 31, 36, 43, 99, 1 << 31, *range(30))), nbytes=4096)
    return replace(file, weights=tuple(changed if w is weight else w for w in file.weights))


def _names(file: File, rng: random.Random) -> File:
    name = rng.choice(
        (b"", b"\0", b"\xff" * 63, b"x" * 64, b"token_embd.weight\0x", b"blk.4294967295.attn_q.weight")
    )
    if rng.randrange(2):
        weight = rng.choice(file.weights)
        return replace(file, weights=tuple(replace(w, name=name) if w is weight else w for w in file.weights))
    return replace(file, keys=(*file.keys, Key(name * rng.choice((1, 10)), U32, 1)))


def _alignment(file: File, rng: random.Random) -> File:
    return file.with_key(
        "general.alignment", U32, rng.choice((0, 1, 3, 8, 16, 64, 4096, 1 << 20, (1 << 32) - 1))
    )


def _special(file: File, rng: random.Random) -> File:
    name = rng.choice(("bos", "eos", "eot", "eom", "unknown", "padding", "fim_pre", "fim_suf", "seperator"))
    return file.with_key(
        f"tokenizer.ggml.{name}_token_id", rng.choice((U32, I32)), rng.choice((0, 299, 300, 1 << 30))
    )


def _template(file: File, rng: random.Random) -> File:
    return file.with_key("tokenizer.chat_template", STRING, rng.choice(TEMPLATES))


def _greedy_kv(file: File, rng: random.Random) -> File:
    """Keys and values far larger than the weights: narrow matrices with many rows."""
    arch = next(str(k.value) for k in file.keys if k.name == "general.architecture")
    rows = rng.choice((1 << 9, 1 << 12, 1 << 14))
    heads = rng.choice((1, 16, 256))
    for name, value in (
        ("head_count_kv", heads),
        ("key_length", rows // heads),
        ("value_length", rows // heads),
    ):
        file = file.with_key(f"{arch}.attention.{name}", U32, value)
    file = file.with_key(f"{arch}.attention.head_count", U32, heads)
    file = file.with_key(f"{arch}.rope.dimension_count", U32, rows // heads)
    file = file.with_key(f"{arch}.context_length", U32, rng.choice((512, 1 << 20)))
    for layer in range(2):
        for part in "qkv":
            file = file.with_weight(Weight(f"blk.{layer}.attn_{part}.weight", (64, rows)))
        file = file.with_weight(Weight(f"blk.{layer}.attn_output.weight", (rows, 64)))
    return file


def _bytes(file: File, rng: random.Random) -> bytes:
    """Anything in the header; cut anywhere."""
    data = bytearray(file.to_bytes())
    end = len(file.header())
    for _ in range(rng.choice((1, 1, 2, 16))):
        at = rng.randrange(end)
        if rng.randrange(2):
            data[at] = rng.randrange(256)
        else:
            data[at : at + 8] = struct.pack("<Q", rng.choice(BIG))
    return bytes(data[: rng.choice((len(data), len(data), rng.randrange(end)))])


CHANGES: tuple[Change, ...] = (
    *(_meaning,) * 6,
    _counts,
    _array_length,
    _short_array,
    _value_type,
    _huge,
    _duplicate,
    _offset,
    _shape,
    _type,
    _names,
    _alignment,
    _special,
    *(_template,) * 2,
    _greedy_kv,
    _bytes,
)


def mutant(number: int) -> tuple[str, bytes]:
    """The number decides everything. Every kind of change comes once in each round."""
    rng = random.Random(f"mutant {number}")
    change = CHANGES[number % len(CHANGES)]
    arch = rng.choice(ARCHITECTURES)
    changed = change(whole_model(arch), rng)
    return f"{number}: {arch} {change.__name__}", changed if isinstance(changed, bytes) else _written(changed)


def _written(file: File) -> bytes:
    try:
        return file.to_bytes()
    except (KeyError, OverflowError, ZeroDivisionError, MemoryError):
        # Sizes that no file has: the header with a little data.
        return file.header() + bytes(1 << 16)


class Attacked:
    """A secure world and what it went through."""

    def __init__(self, world: LinuxWorld, device: Device) -> None:
        self._world = world
        self._device = device
        self._flex = device.directory / "mutant.flex"
        self._licence = device.directory / "mutant.lic"
        self._start_bytes = self.resident_bytes()
        self.outcomes: dict[str, int] = {}

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self._world.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) << 10

    def attack(self, what: str, gguf: bytes) -> None:
        try:
            seal_unchecked(gguf, self._flex, self._device.vendor)
        except struct.error:  # a number that the sealed format has no room for
            self.outcomes["unsealable"] = self.outcomes.get("unsealable", 0) + 1
            return
        self._licence.write_bytes(license_for(self._flex, self._device.vendor, self._device.key))
        for outcome in self._within_patience(what):
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        assert self._world.status().restarts == 0, f"{what} ended the secure world"
        grown = self.resident_bytes() - self._start_bytes
        assert grown < GROWTH_BYTES, f"{what}: the secure world grew by {grown >> 20} MiB"

    def _within_patience(self, what: str) -> list[str]:
        found: list[str] = []
        unexpected: list[BaseException] = []

        def work() -> None:
            try:
                found.extend(self._use())
            except BaseException as error:
                unexpected.append(error)

        thread = threading.Thread(target=work, daemon=True)
        start = time.monotonic()
        thread.start()
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), f"{what} took more than {time.monotonic() - start:.0f} s"
        assert not unexpected, f"{what}: {unexpected[0]!r}"
        return found

    def _use(self) -> Iterator[str]:
        try:
            info = self._world.register(ModelSource("mutant", self._flex, self._licence))
        except FlexServeError as error:
            assert error.message
            yield error.code
            return
        asked: list[dict[str, Any]] = [
            {"prompt": "Hé \n llo"},
            {"messages": (Message("user", "Hel \n lo"),)},
            {"token_ids": (0, 299, 7)},
        ]
        if info.makes_embeddings:
            asked[1] = {"prompt": "x", "embed": True}
            asked = [{**fields, "embed": True} for fields in asked]
        for fields in asked:
            request = Request(
                id="mutant", model="mutant", max_tokens=3, sampling=Sampling(temperature=0), **fields
            )
            try:
                *_, last = self._world.generate(request)
                assert isinstance(last, Finished)
                assert bool(last.embedding) == info.makes_embeddings
                yield "answered"
            except FlexServeError as error:
                assert error.message
                yield f"asked: {error.code}"


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    device = make_device(tmp_path_factory.mktemp("mutants"))
    with linux_world(device, context_tokens=512) as world:
        yield Attacked(world, device)


def run(attacked: Attacked, numbers: range) -> None:
    attacked.outcomes.clear()
    for number in numbers:
        attacked.attack(*mutant(number))
    # The mutants are neither hopeless nor all harmless.
    assert attacked.outcomes["answered"] > len(numbers) / 10, attacked.outcomes
    assert attacked.outcomes["model_malformed"] > len(numbers) / 10, attacked.outcomes


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_model_that_is_mutated_answers(attacked: Attacked, arch: str) -> None:
    attacked.outcomes.clear()
    attacked.attack(arch, whole_model(arch).to_bytes())
    assert attacked.outcomes == {"answered": 3}


def test_two_hundred_mutants_of_a_trusted_vendor_do_no_harm(attacked: Attacked) -> None:
    run(attacked, range(200))


@pytest.mark.slow
def test_two_thousand_more_mutants_do_no_harm(attacked: Attacked) -> None:
    run(attacked, range(200, 2200))


@pytest.mark.parametrize("number", range(len(TEMPLATES)))
def test_a_template_bomb_harms_nobody(attacked: Attacked, number: int) -> None:
    file = whole_model("llama").with_key("tokenizer.chat_template", STRING, TEMPLATES[number])
    attacked.attack(f"template {number}", file.to_bytes())
