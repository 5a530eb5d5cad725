"""A saved session that somebody changed, moved, cut or kept costs a recompute: never a wrong answer, never an error.

Rule: the index and every chunk of the state are authentic under a key of this device and this save, with the whole head
in their associated data; llama.cpp sees a state only when all of it is (docs/sealed-format.md, "Saved session").
"""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexserve.core import Finished, Request, Sampling
from flexserve.engine.model_sessions import ModelSessions
from flexserve.engine.sessions import SessionStore
from flexserve.errors import SessionRefused
from flexserve.sealed.keys import DeviceKey
from flexserve.sealed.session_file import (
    CHUNK_BYTES,
    HEAD_BYTES,
    SUFFIX,
    MadeBy,
    SavedSession,
    Tokens,
    file_bytes,
    open_session,
    write,
)

from ..sealed_fixtures import SMALL
from ..world_fixtures import Device, kill, linux_world

DEVICE = DeviceKey.generate()
HERE = MadeBy(b"m" * 32, "engine-1", "ctx=512")
STATE = random.Random(0).randbytes(CHUNK_BYTES + 5000)
TOKENS = Tokens(array("i", range(40)), array("i", [30, *[1] * 10]), "a name")


@dataclass(frozen=True)
class File:
    """A saved session, and ways to change it."""

    path: Path

    @property
    def data(self) -> bytes:
        return self.path.read_bytes()

    def read(self, data: bytes | None = None, device: DeviceKey = DEVICE) -> tuple[SavedSession, bytes]:
        """Open it and read the whole state, with these bytes in the file. Raises `SessionRefused`."""
        path = self.path
        if data is not None:
            path = self.path.with_suffix(".changed")
            path.write_bytes(data)
        with path.open("rb") as file:
            saved = open_session(file.fileno(), device)
            out = memoryview(bytearray(saved.state_bytes))
            saved.read_state(file.fileno(), out)
            return saved, bytes(out)

    def refused(self, reason: str, data: bytes | None = None, device: DeviceKey = DEVICE) -> None:
        with pytest.raises(SessionRefused, match=reason):
            self.read(data, device)


def save(path: Path, tokens: Tokens = TOKENS, state: bytes = STATE) -> File:
    with path.open("w+b") as file:
        assert write(file.fileno(), tokens, memoryview(state), HERE, DEVICE) == path.stat().st_size
    return File(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> File:
    return save(tmp_path_factory.mktemp("session") / "s")


def test_the_file_itself_is_believed(saved: File) -> None:
    """The control."""
    found, state = saved.read()
    assert (found.tokens, found.made_by, state) == (TOKENS, HERE, STATE)


def test_nothing_of_a_conversation_is_in_clear(saved: File) -> None:
    data = saved.data
    assert b"a name" not in data
    assert TOKENS.ids.tobytes()[4:40] not in data
    assert not any(STATE[i : i + 16] in data for i in range(0, len(STATE), 1 << 16))


def test_every_save_has_a_fresh_key(tmp_path: Path) -> None:
    one, two = save(tmp_path / "1"), save(tmp_path / "2")
    assert one.read()[0].salt != two.read()[0].salt
    assert one.data[HEAD_BYTES : HEAD_BYTES + 64] != two.data[HEAD_BYTES : HEAD_BYTES + 64]


@settings(max_examples=150, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), front=st.booleans())
def test_any_flipped_bit_is_refused(saved: File, where: float, bit: int, front: bool) -> None:
    data = bytearray(saved.data)
    data[int(where * (HEAD_BYTES + 300 if front else len(data)))] ^= 1 << bit
    saved.refused("the saved session", bytes(data))


@pytest.mark.parametrize("keep", [0, 7, 255, HEAD_BYTES, HEAD_BYTES + 100, CHUNK_BYTES, -16, -1])
def test_a_truncated_or_longer_file_is_refused(saved: File, keep: int) -> None:
    saved.refused("the saved session", saved.data[:keep])
    saved.refused("the saved session", saved.data + bytes(max(keep, 1)))


def test_a_file_that_is_cut_after_it_was_believed_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "s").path
    with path.open("r+b") as file:
        found = open_session(file.fileno(), DEVICE)
        file.truncate(HEAD_BYTES + 1000)
        with pytest.raises(SessionRefused, match="to its end"):
            found.read_state(file.fileno(), memoryview(bytearray(found.state_bytes)))


def test_the_session_of_another_device_is_refused(saved: File) -> None:
    saved.refused("another device", device=DeviceKey.generate())


def test_a_session_that_claims_to_be_this_devices_is_refused_without_its_key(saved: File) -> None:
    thief = DeviceKey.generate()
    saved.refused("not what this device wrote", saved.data[:32] + thief.key_id + saved.data[64:], thief)


def test_a_session_cannot_be_given_to_another_model_engine_or_context(saved: File) -> None:
    for at in (64, 128, 192):
        data = bytearray(saved.data)
        data[at] ^= 1
        saved.refused("not what this device wrote", bytes(data))


def test_the_state_of_one_session_does_not_fit_the_tokens_of_another(saved: File, tmp_path: Path) -> None:
    """Forged token ids: the index of another conversation in front of this state, or the other way round."""
    other = save(tmp_path / "o", Tokens(array("i", range(1, 41)), TOKENS.batches, TOKENS.name))
    at = file_bytes(12 + 6 + 4 * (40 + 11), 0)
    other.refused("chunk 1", other.data[:at] + saved.data[at:])
    saved.refused("not what this device wrote", saved.data[:HEAD_BYTES] + other.data[HEAD_BYTES:])


def test_two_chunks_cannot_change_places(tmp_path: Path) -> None:
    two = save(tmp_path / "two", state=STATE[:CHUNK_BYTES] * 2)
    at, size = file_bytes(12 + 6 + 4 * (40 + 11), 0), CHUNK_BYTES + 16
    data = two.data
    two.refused("chunk 1", data[:at] + data[at + size :] + data[at : at + size])


@pytest.mark.parametrize(
    "tokens",
    [
        Tokens(array("i", [1, -2]), array("i", [2])),
        Tokens(array("i", [1, 2]), array("i", [3])),
        Tokens(array("i", [1, 2]), array("i", [2, 0])),
        Tokens(array("i", [1, 2]), array("i", [3, -1])),
    ],
)
def test_even_what_the_device_wrote_must_follow_the_rules(tmp_path: Path, tokens: Tokens) -> None:
    save(tmp_path / "s", tokens).refused("impossible tokens")


def test_llama_cpp_never_sees_a_state_that_is_not_authentic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last byte is wrong: the first mebibyte was fine, and is not used either."""
    path = save(tmp_path / "s").path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    store = SessionStore()
    store.add_saved(DEVICE, os.open(path, os.O_RDONLY))
    seen: list[str] = []

    class Llama:
        def set_state(self, *_: object) -> bool:
            seen.append("set")
            return True

        def clear(self) -> None:
            seen.append("clear")

    sessions = ModelSessions(store, HERE, whole_only=False)
    assert sessions.resume(Llama(), list(range(40))) == (0, 0.0)
    assert seen == ["clear"]
    assert store.memory_bytes == 0
    assert store.find(HERE, list(range(40))) is None  # it is not tried again


# Through the whole path


def ask(world: object, ids: tuple[int, ...], number: int) -> Finished:
    request = Request(
        id=f"r{number}",
        model="m",
        token_ids=ids,
        max_tokens=8,
        ignore_eos=True,
        sampling=Sampling(temperature=0),
    )
    *_, last = world.generate(request)  # type: ignore[attr-defined]
    assert isinstance(last, Finished)
    return last


PROMPT = tuple(range(5, 45))


@pytest.fixture
def sessions(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "sessions"


def follow_up(first: Finished) -> tuple[int, ...]:
    return (*PROMPT, *first.token_ids, *range(50, 60))


def test_a_session_survives_a_restart_and_says_the_same(device: Device, sessions: Path) -> None:
    source, _ = device.add_kit("m", SMALL)
    with linux_world(device, session_dir=sessions) as world:
        world.register(source)
        first = ask(world, PROMPT, 1)
        expected = ask(world, follow_up(first), 2)
        assert expected.timings.cached_prompt_tokens == 47
    (file,) = sessions.glob(f"*{SUFFIX}")
    assert file.stat().st_mode & 0o777 == 0o600
    with linux_world(device, session_dir=sessions) as world:
        world.register(source)
        model = world.status().models[0]
        assert (model.sessions, model.session_bytes, model.saved_sessions) == (1, 0, 1)
        third = (*follow_up(first), *expected.token_ids, 7)
        again = ask(world, third, 1)
        assert again.timings.cached_prompt_tokens == len(follow_up(first)) + 7
        assert again.timings.restore_s > 0


def test_damaged_swapped_and_strange_files_cost_a_recompute_only(device: Device, sessions: Path) -> None:
    source, _ = device.add_kit("m", SMALL)
    with linux_world(device, session_dir=sessions) as world:
        world.register(source)
        first = ask(world, PROMPT, 1)
        ask(world, tuple(range(100, 140)), 2)
        assert world.save_sessions() == 2
        assert world.save_sessions() == 0
    one, two = sessions.glob(f"*{SUFFIX}")
    content = one.read_bytes(), two.read_bytes()
    (sessions / ("0" * 64 + SUFFIX)).write_bytes(b"FLEXSESS" + bytes(1000))
    (sessions / ("1" * 64 + SUFFIX)).symlink_to("/etc/passwd")
    (sessions / "notes").write_text("not a session")
    one.write_bytes(content[1])
    two.write_bytes(content[0])
    with linux_world(device, session_dir=sessions) as world:  # swapped names mean nothing
        world.register(source)
        told = ask(world, follow_up(first), 1)
        assert told.timings.cached_prompt_tokens == 47
    for path in sessions.glob("*" + SUFFIX):
        if not path.is_symlink():
            data = bytearray(path.read_bytes())
            data[-1:] = bytes([data[-1] ^ 1])
            path.write_bytes(data)
    with linux_world(device, session_dir=sessions) as world:
        world.register(source)
        told = ask(world, follow_up(first), 1)
        assert told.timings.cached_prompt_tokens == 0
        assert len(told.token_ids) == 8


def test_an_old_save_is_a_shorter_prefix_and_gives_the_same_answer(device: Device, sessions: Path) -> None:
    source, _ = device.add_kit("m", SMALL)
    with linux_world(device, session_dir=sessions) as world:
        world.register(source)
        first = ask(world, PROMPT, 1)
        world.save_sessions()
        (old,) = sessions.glob(f"*{SUFFIX}")
        kept = old.read_bytes()
        expected = ask(world, follow_up(first), 2)
        world.save_sessions()
        assert not old.exists()
    for path in list(sessions.iterdir()):
        path.unlink()
    old.write_bytes(kept)
    with linux_world(device, session_dir=sessions) as world:
        world.register(source)
        again = ask(world, follow_up(first), 1)
    assert again.timings.cached_prompt_tokens == 47
    assert again.token_ids == expected.token_ids


def test_the_session_of_another_model_of_the_same_shape_is_not_used(device: Device, sessions: Path) -> None:
    source, kit = device.add_kit("m", SMALL)
    with linux_world(device, session_dir=sessions) as world:
        world.register(source)
        first = ask(world, PROMPT, 1)
    other = device.add("m", kit.gguf)  # the same weights, sealed anew: another sealing
    with linux_world(device, session_dir=sessions) as world:
        world.register(other)
        assert ask(world, follow_up(first), 1).timings.cached_prompt_tokens == 0


def test_after_a_killed_process_the_saved_session_is_there(device: Device, sessions: Path) -> None:
    source, _ = device.add_kit("m", SMALL)
    with linux_world(device, session_dir=sessions) as world:
        world.register(source)
        first = ask(world, PROMPT, 1)
        world.save_sessions()
        kill(world)
        while True:  # the death may not have been noticed yet: the request is lost with it then
            try:
                told = ask(world, follow_up(first), 2)
                break
            except Exception as error:
                assert getattr(error, "code", "") == "world_crashed"
        assert told.timings.cached_prompt_tokens == 47
