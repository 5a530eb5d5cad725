"""Another program of the same user looks for plaintext weights: in files, in logs, in processes, in dumps.

Rule: plaintext weights exist in the secure process only, and that process lets nobody without privilege look
into it (worlds/linux/hardening.py). Each look is shown to find them where the hardening is switched off.
"""

from __future__ import annotations

import base64
import dataclasses
import errno
import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexserve.bench.generate import write_model
from flexserve.sealed.gguf import parse_header, read_header
from flexserve.worlds.base import AdapterSource, ModelSource

from ..adapters import write_adapter
from ..attacker import (
    as_same_user,
    children,
    file_has,
    files_with,
    gcore,
    memory_has,
    needs_gcore,
    needs_tracing,
    process_vm_read,
    read_as_debugger,
    traced,
)
from ..sealed_fixtures import SMALL, model_key
from ..served import Served, served
from ..world_fixtures import Device, make_device

CORE_PATTERN = Path("/proc/sys/kernel/core_pattern").read_text().strip()
# gdb gives up a mapping at the first page it cannot read, as an absent one of the arena: here every answer
# needs all pages, since the embedding is the output matrix too, and its 1 MiB leaves no gap before the body.
SHAPE = dataclasses.replace(SMALL, vocabulary=2048, tied_output=True)

needs_core_files = pytest.mark.skipif(
    "/" in CORE_PATTERN or CORE_PATTERN.startswith("|"),
    reason=f"cores do not go to the working directory here: core_pattern is {CORE_PATTERN!r}",
)


@dataclasses.dataclass(frozen=True)
class Marked:
    """A device with a model, and an adapter for it, whose weights contain canaries."""

    device: Device
    source: ModelSource
    body: bytes
    embedding: bytes
    adapter: bytes

    @property
    def canaries(self) -> tuple[bytes, ...]:
        return self.body, self.embedding, self.adapter

    @property
    def dumpable(self) -> tuple[bytes, ...]:
        """Those that a dump has where nothing is hardened: an adapter's memory is in none."""
        return self.body, self.embedding


def mark(gguf: Path) -> tuple[bytes, bytes]:
    """Write two canaries into a model: text that is also numbers a norm and an embedding can have."""
    data = bytearray(gguf.read_bytes())
    header = parse_header(bytes(data), len(data))
    tensors = {t.name: header.data_offset + t.offset for t in header.tensors}
    # F32: three letters and `?` (0x3f) are a number from 0.5 to 1.
    body = b"".join(secrets.token_hex(2)[:3].encode() + b"?" for _ in range(64))
    at = tensors["blk.0.attn_norm.weight"]
    data[at : at + len(body)] = body
    # F16: a letter and `0` (0x30) are a number from 0.125 to 0.16. A row of 512 bytes, once in each 16 KiB.
    embedding = b"".join(secrets.token_hex(1)[:1].encode() + b"0" for _ in range(256))
    for row in range(0, SHAPE.vocabulary, 32):
        at = tensors["token_embd.weight"] + row * len(embedding)
        data[at : at + len(embedding)] = embedding
    gguf.write_bytes(data)
    return body, embedding


def marked_adapter(gguf: Path) -> tuple[Path, bytes]:
    """An adapter with a canary in its first matrix."""
    path = write_adapter(gguf.with_name("a.gguf"), gguf, ["blk.0.attn_q.weight"])
    header = read_header(path)[1]
    canary = b"".join(secrets.token_hex(2)[:3].encode() + b"?" for _ in range(64))
    data = bytearray(path.read_bytes())
    data[header.data_offset : header.data_offset + len(canary)] = canary
    path.write_bytes(data)
    return path, canary


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Marked:
    gguf = tmp_path_factory.mktemp("vendor") / "m.gguf"
    write_model(SHAPE, "F16", gguf)
    body, embedding = mark(gguf)
    adapter_gguf, adapter = marked_adapter(gguf)
    device = make_device(tmp_path_factory.mktemp("d"))
    sealed = device.add("a", adapter_gguf)
    source = dataclasses.replace(device.add("m", gguf), adapter=AdapterSource(sealed.sealed, sealed.licence))
    return Marked(device, source, body, embedding, adapter)


@pytest.fixture(scope="module")
def server(marked: Marked, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A hardened server that has answered, so that all its weights are in memory."""
    with served(marked.device, marked.source, tmp_path_factory.mktemp("s")) as running:
        assert running.complete("hello").status_code == 200
        yield running


@pytest.fixture(scope="module")
def control(marked: Marked, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The same without hardening."""
    with served(marked.device, marked.source, tmp_path_factory.mktemp("c"), hardened=False) as running:
        assert running.complete("hello").status_code == 200
        yield running


def test_no_file_and_no_log_has_the_weights(server: Served, marked: Marked) -> None:
    assert server.complete("again").status_code == 200
    for directory in (server.directory, marked.device.directory):
        assert files_with(directory, marked.canaries) == []


def test_the_gateway_never_has_the_weights_in_memory(server: Served, marked: Marked) -> None:
    # As whoever runs the tests: root sees all of it, and still finds nothing.
    pid = server.process.pid
    assert memory_has(pid, str(server.admin).encode()), "the search itself works"
    for canary in marked.canaries:
        assert not memory_has(pid, canary)


def test_the_gateway_never_has_a_key_in_memory(server: Served, marked: Marked) -> None:
    pid, device = server.process.pid, marked.device
    secret = device.key.secret
    assert base64.b64encode(secret) in device.key_path.read_bytes()
    for canary in (secret, base64.b64encode(secret), model_key(marked.source.sealed, device.vendor)):
        assert not memory_has(pid, canary)


def test_the_same_user_cannot_look_into_the_secure_process(server: Served, marked: Marked) -> None:
    for pid in (server.secure_pid, *children(server.secure_pid)):
        for name in ("mem", "maps", "smaps", "environ", "auxv", "stack", "pagemap"):
            with pytest.raises(PermissionError):
                as_same_user(Path(f"/proc/{pid}/{name}").read_bytes)
        assert as_same_user(lambda pid=pid: process_vm_read(pid)) == errno.EPERM  # type: ignore[misc]
    with pytest.raises(PermissionError):
        as_same_user(lambda: memory_has(server.secure_pid, marked.body))


@needs_tracing
def test_control_the_same_user_finds_the_weights_without_hardening(control: Served, marked: Marked) -> None:
    pid = control.secure_pid
    assert as_same_user(lambda: process_vm_read(pid)) == errno.EFAULT
    for canary in marked.canaries:
        assert as_same_user(lambda canary=canary: memory_has(pid, canary))  # type: ignore[misc]


def test_the_same_user_cannot_trace_the_secure_process(server: Served) -> None:
    for pid in (server.secure_pid, *children(server.secure_pid)):
        with pytest.raises(PermissionError):
            as_same_user(lambda pid=pid: traced(pid).__enter__())  # type: ignore[misc]


@needs_tracing
def test_control_a_debugger_reads_the_weights_without_hardening(control: Served, marked: Marked) -> None:
    pid = control.secure_pid
    assert as_same_user(lambda: read_as_debugger(pid, marked.body))
    assert control.complete("still there").status_code == 200


@needs_gcore
def test_gcore_of_the_same_user_dumps_nothing(server: Served, tmp_path: Path) -> None:
    pid = server.secure_pid
    assert as_same_user(lambda: gcore(pid, tmp_path / "core")) is None
    assert list(tmp_path.iterdir()) == []
    assert server.complete("still there").status_code == 200


@needs_gcore
def test_control_gcore_dumps_the_weights_without_hardening(
    control: Served, marked: Marked, tmp_path: Path
) -> None:
    pid = control.secure_pid
    dump = as_same_user(lambda: gcore(pid, tmp_path / "core"))
    assert dump is not None
    for canary in marked.dumpable:
        assert file_has(dump, canary)
    dump.unlink()
    assert control.complete("still there").status_code == 200


@needs_gcore
def test_gcore_of_the_gateway_has_no_weights(server: Served, marked: Marked, tmp_path: Path) -> None:
    pid = server.process.pid
    dump = as_same_user(lambda: gcore(pid, tmp_path / "core"))
    assert dump is not None, "the gateway may be dumped: it has nothing of the model"
    assert file_has(dump, str(server.admin).encode())
    for canary in marked.canaries:
        assert not file_has(dump, canary)
    dump.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can show what root can")
def test_root_reads_everything_as_the_threat_model_says(server: Served, marked: Marked) -> None:
    for canary in marked.canaries:
        assert memory_has(server.secure_pid, canary)


# Crashes: last, since they start the secure process anew


def crash(running: Served, number: int) -> int:
    """End the secure process with a signal; returns once the next one answers, with the old one's id."""
    pid = running.secure_pid
    as_same_user(lambda: os.kill(pid, number))
    answer = running.complete("hello")
    assert answer.status_code in (200, 503)
    assert running.complete("hello").status_code == 200
    assert running.secure_pid != pid
    return pid


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_crash_leaves_no_core_file(server: Served, marked: Marked, number: int) -> None:
    crash(server, number)
    assert sorted(p.name for p in (server.directory / "work").iterdir()) == ["stderr.txt"]
    assert files_with(server.directory, marked.canaries) == []


@needs_core_files
def test_control_a_crash_leaves_a_core_file_with_the_weights_without_hardening(
    control: Served, marked: Marked
) -> None:
    crash(control, signal.SIGSEGV)
    (core,) = (control.directory / "work").glob("core*")
    for canary in marked.dumpable:
        assert file_has(core, canary)
    core.unlink()
