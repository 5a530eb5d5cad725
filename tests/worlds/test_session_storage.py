"""Saved sessions on the normal side: whole files or none, within limits, and saved when it is quiet."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from flexserve.errors import StorageFailure, WorldCrashed
from flexserve.sealed.session_file import SUFFIX
from flexserve.worlds.linux.channel import SessionOffered, SessionSaved, WorkflowsSaved
from flexserve.worlds.linux.session_storage import SessionKeeper, SessionStorage
from flexserve.worlds.linux.workflows import FILE


def salt(number: int) -> bytes:
    return bytes([number]) * 32


def add(storage: SessionStorage, number: int, size: int = 100) -> None:
    file = storage.new()
    os.write(file.fd, bytes([number]) * size)
    file.commit(salt(number))
    file.close()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_has_no_name_until_it_is_whole(tmp_path: Path) -> None:
    storage = SessionStorage(tmp_path / "s")
    file = storage.new()
    assert [n for n in names(tmp_path / "s") if n.endswith(SUFFIX)] == []
    file.close()
    assert names(tmp_path / "s") == []
    add(storage, 1)
    assert names(tmp_path / "s") == [salt(1).hex() + SUFFIX]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    SessionStorage(tmp_path).new()
    assert len(names(tmp_path)) == 1
    SessionStorage(tmp_path)
    assert names(tmp_path) == []


def test_the_oldest_files_go_first(tmp_path: Path) -> None:
    storage = SessionStorage(tmp_path, limit_bytes=250)
    for number in (1, 2, 3):
        add(storage, number)
        os.utime(tmp_path / (salt(number).hex() + SUFFIX), (number, number))
    (tmp_path / "somebody else's").write_bytes(bytes(1000))
    found = storage.open_all()
    assert [os.read(fd, 1)[0] for fd in found] == [3, 2]
    assert names(tmp_path) == [salt(2).hex() + SUFFIX, salt(3).hex() + SUFFIX, "somebody else's"]
    for fd in found:
        os.close(fd)


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailure, match="file/below"):
        SessionStorage(tmp_path / "file" / "below")


def nothing() -> None:
    """Nobody is told."""


def test_the_keeper_saves_when_it_is_wanted_and_everything_at_the_end(tmp_path: Path) -> None:
    unsaved = [salt(1), salt(2)]
    emptied = threading.Event()
    asked: list[bool] = []

    def call(kind: Any, make: Any, descriptors: tuple[int, ...], _process: object = None) -> Any:
        if kind is WorkflowsSaved:
            return WorkflowsSaved(1, None)
        assert kind is SessionSaved
        assert len(descriptors) == 1
        asked.append(make(1).everything)
        if unsaved:
            return SessionSaved(1, unsaved.pop(), [])
        emptied.set()
        return SessionSaved(1, None, [])

    keeper = SessionKeeper(tmp_path, call, nothing)
    keeper.start()
    assert names(tmp_path) == []  # nothing was wanted
    keeper.wanted()
    assert emptied.wait(20)
    assert not any(asked)
    unsaved.append(salt(3))
    keeper.finish()
    keeper.finish()
    assert asked[-1]
    assert names(tmp_path) == [salt(n).hex() + SUFFIX for n in (1, 2, 3)]


def test_files_that_are_not_needed_any_more_go_after_the_save(tmp_path: Path) -> None:
    answers = [SessionSaved(1, salt(2), [salt(1)]), SessionSaved(1, None, [])]
    keeper = SessionKeeper(tmp_path, lambda *_: answers.pop(0), nothing)
    add(keeper.storage, 1)
    assert keeper.save() == 1
    assert names(tmp_path) == [salt(2).hex() + SUFFIX]


def test_a_process_that_ends_while_it_saves_leaves_no_half_file(tmp_path: Path) -> None:
    def call(*_: object) -> Any:
        raise WorldCrashed("it ended")

    keeper = SessionKeeper(tmp_path, call, nothing)
    with pytest.raises(WorldCrashed):
        keeper.save()
    assert names(tmp_path) == []
    add(keeper.storage, 1)
    add(keeper.storage, 2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(WorldCrashed):
        keeper.offer(None)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_every_file_is_offered_once(tmp_path: Path) -> None:
    offered: list[int] = []

    def call(kind: Any, _make: Any, descriptors: tuple[int, ...], _process: object) -> Any:
        assert kind is SessionOffered
        offered.append(os.read(descriptors[0], 1)[0])
        return SessionOffered(1, believed=False)

    keeper = SessionKeeper(tmp_path, call, nothing)
    add(keeper.storage, 1)
    add(keeper.storage, 2)
    keeper.offer(None)
    assert sorted(offered) == [1, 2]


def test_the_workflow_log_is_written_when_it_changed_and_not_too_often(tmp_path: Path) -> None:
    answers = [b"one", None, b"three"]

    def call(kind: Any, _make: Any, _descriptors: tuple[int, ...], _process: object = None) -> Any:
        assert kind is WorkflowsSaved
        return WorkflowsSaved(1, answers.pop(0))

    keeper = SessionKeeper(tmp_path, call, nothing).workflows
    keeper.save(now=False)  # it has just begun
    assert names(tmp_path) == []
    for content in (b"one", b"one", b"three"):
        keeper.save(now=True)
        assert names(tmp_path) == [FILE]
        assert (tmp_path / FILE).read_bytes() == content
    assert not answers


def test_a_storage_that_refuses_is_told_of_so_that_nobody_waits(tmp_path: Path) -> None:
    told = threading.Event()

    def call(*_: object) -> Any:
        raise StorageFailure("the disk is full")

    keeper = SessionKeeper(tmp_path, call, told.set)
    keeper.start()
    keeper.wanted()
    assert told.wait(20)
    keeper.finish()
