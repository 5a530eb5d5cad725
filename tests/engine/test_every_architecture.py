"""What llama.cpp can compute, it computes sealed: every architecture, whatever tensors it has, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..coverage import SHOWN

ROOT = Path(__file__).parents[2]


class Worker:
    """Compares architectures in a process of its own, which llama.cpp may end."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[str] | None = None

    def outcome(self, arch: str) -> str:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.engine.all_architectures", str(self._directory)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{arch}\n")
        self._process.stdin.flush()
        if answer := self._process.stdout.readline().strip():
            return answer
        died = self._process.wait()
        self.close()
        return f"died ({died})"

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin
            assert self._process.stdout
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._process = None


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    made = Worker(tmp_path_factory.mktemp("every"))
    yield made
    made.close()


@pytest.mark.parametrize("arch", SHOWN)
def test_the_sealed_model_computes_what_plain_llama_cpp_computes(arch: str, worker: Worker) -> None:
    assert worker.outcome(arch) == "equal"
