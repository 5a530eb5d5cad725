"""A trial: llama.cpp loads a plain model in a limited child process and builds its graphs, before a vendor seals it.

For architectures whose keys have no rules of their own. What would abort llama.cpp on every device ends the child
here. No weight is computed with, so it takes seconds for any size. Knows nothing of sealing.

Run as a program: the path in, nothing out; a reason on stderr when it fails.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from ..errors import ModelUnsupported

SECONDS = 300  # a large file may come from slow storage
CONTEXT_TOKENS = 512


def try_model(path: Path, architecture: str) -> None:
    """Raises `ModelUnsupported` with llama.cpp's reason when it cannot load the model, or dies trying."""
    environment = {"GGML_NO_BACKTRACE": "1", "PATH": os.environ.get("PATH", "")}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(path.absolute())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refused(architecture, f"it took more than {SECONDS} s") from None
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        why = lines[-1][:300] if lines else ""
        if done.returncode < 0:
            why = f"it ended with {signal.Signals(-done.returncode).name}" + (f": {why}" if why else "")
        raise _refused(architecture, why)


def _refused(architecture: str, why: str) -> ModelUnsupported:
    return ModelUnsupported(
        f"llama.cpp could not load this model of architecture {architecture!r} in a trial: {why}",
        hint="the file is damaged, or of another version than this llama.cpp reads",
    )


def main() -> None:
    path = Path(sys.argv[1])
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, resource.getrlimit(resource.RLIMIT_NPROC)[0]),
        (resource.RLIMIT_CPU, SECONDS),
    ):
        resource.setrlimit(limit, (value, value))
    import llama_cpp as api

    errors: list[str] = []

    def note(level: int, text: bytes, _user: object) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            errors.append(text.decode("utf-8", "replace").strip())

    callback = api.llama_log_callback(note)
    api.llama_log_set(callback, ctypes.c_void_p(0))
    api.llama_backend_init()
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False  # weights stay in the file, mapped
    params.load_mode = api.LLAMA_LOAD_MODE_MMAP
    model = api.llama_model_load_from_file(str(path).encode(), params)
    settings = api.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = CONTEXT_TOKENS
    settings.n_threads = settings.n_threads_batch = 1
    if not model or not api.llama_init_from_model(model, settings):  # builds the graphs, and measures them
        reasons = [line for line in errors if "error loading model" in line] or errors
        sys.exit(reasons[0] if reasons else "llama.cpp gave no reason")
    os._exit(0)  # nothing is to be freed


if __name__ == "__main__":
    main()
