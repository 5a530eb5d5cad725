from __future__ import annotations

import hashlib
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexserve.errors import RolledBack, StateNotAuthentic, StorageFailure, Usage
from flexserve.sealed import statefile
from flexserve.sealed.format import Manifest, TensorExtent
from flexserve.sealed.keys import DeviceKey
from flexserve.sealed.state import MAX_ENTRIES, MAX_STATE_BYTES, DeviceState

from .test_format import manifest_for

DEVICE = DeviceKey.generate()
BASE = manifest_for(1, 0, 4096, (TensorExtent(0, 64),))


def model(name: str, version: int) -> Manifest:
    return replace(BASE, model_id=name, model_version=version)


steps = st.tuples(st.sampled_from("ab"), st.integers(1, 4), st.sampled_from([b"x", b"y"]), st.integers(1, 4))


@given(st.lists(st.tuples(steps, st.integers(0, 100)), max_size=12))
def test_a_device_never_goes_back_and_never_refuses_the_newest(
    history: list[tuple[tuple[str, int, bytes, int], int]],
) -> None:
    state = DeviceState()
    versions: dict[str, int] = {}
    serials: dict[tuple[str, int, bytes], int] = {}
    times = [0]
    for (name, version, sealing, serial), now in history:
        digest = hashlib.sha256(f"{name} {version}".encode() + sealing).digest()
        old = version < versions.get(name, 0) or serial < serials.get((name, version, digest), 0)
        if old:
            with pytest.raises(RolledBack):
                state.check(model(name, version), digest, serial)
            continue
        state.check(model(name, version), digest, serial)
        state = state.accept(model(name, version), digest, serial, now)
        state = DeviceState.decode(state.encode(DEVICE), DEVICE)
        versions[name] = version
        serials[name, version, digest] = serial
        times.append(now)
        assert state.highest_time == max(times)
        assert state.clock(50) == max(*times, 50)


def test_vendors_do_not_see_each_others_models() -> None:
    mine, theirs = model("a", 5), replace(model("a", 1), vendor_key_id=b"x" * 32)
    state = DeviceState().accept(mine, b"d" * 32, 1, 0)
    state.check(theirs, b"e" * 32, 1)
    with pytest.raises(RolledBack, match="has version 4; this device has already used version 5"):
        state.check(model("a", 4), b"d" * 32, 9)


def test_its_size_is_bounded_and_a_full_state_says_so() -> None:
    state = DeviceState()
    for i in range(MAX_ENTRIES):
        state = state.accept(model(f"m{i}", 1), b"d" * 32, 1, 0)
    blob = state.encode(DEVICE)
    assert len(blob) == MAX_STATE_BYTES
    assert len(DeviceState.decode(blob, DEVICE).entries) == MAX_ENTRIES
    with pytest.raises(StorageFailure, match="full"):
        state.accept(model("one-more", 1), b"d" * 32, 1, 0)
    state.accept(model("m7", 2), b"e" * 32, 1, 0)  # a newer version takes the old one's place


def test_another_device_cannot_have_written_it() -> None:
    blob = DeviceState().accept(model("a", 1), b"d" * 32, 1, 0).encode(DEVICE)
    with pytest.raises(StateNotAuthentic):
        DeviceState.decode(blob, DeviceKey.generate())


def _append(path: Path, count: int) -> None:
    for _ in range(count):
        with statefile.locked(path):
            statefile.store(path, (statefile.load(path) or b"") + b"x")


def test_two_users_of_the_state_lose_none_of_each_others_changes(tmp_path: Path) -> None:
    path = tmp_path / "device.state"
    other = threading.Thread(target=_append, args=(path, 20))  # flock tells open files apart, not processes
    other.start()
    _append(path, 20)
    other.join()
    assert statefile.load(path) == b"x" * 40
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {p.name for p in tmp_path.iterdir()} == {"device.state", "device.lock"}


def test_the_state_of_a_device_has_its_own_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = statefile.state_path(DEVICE.key_id)
    assert path.parent == tmp_path / "flexserve"
    assert path != statefile.state_path(DeviceKey.generate().key_id)
    assert statefile.load(path) is None
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert statefile.state_path(DEVICE.key_id).is_absolute()


def test_a_user_without_a_home_directory_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(Usage, match="no home directory"):
        statefile.state_path(DEVICE.key_id)
