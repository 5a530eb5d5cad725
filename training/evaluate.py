"""Runs a committed GGUF through llama.cpp, greedy, and counts exactly right answers.

    python -m training.evaluate [TASK]             print the figures and every miss; `assistant` without a name
    python -m training.evaluate [TASK] --write     and keep them in training/evaluation-TASK.json

Needs llama.cpp only: neither PyTorch nor the tokenizer's trainer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .assistant import handwritten
from .task import Case, Task
from .tasks import TASKS

MAX_TOKENS = 160


@dataclass(frozen=True)
class Score:
    """How many answers of a set were exactly right, and the others."""

    right: int
    total: int
    misses: tuple[dict[str, Any], ...]

    @property
    def share(self) -> float:
        return self.right / self.total


def sets(task: Task) -> dict[str, Sequence[Case]]:
    """What a task is measured with."""
    found: dict[str, Sequence[Case]] = {"held_out": task.held_out()}
    if task.name == "assistant":
        found["handwritten"] = handwritten()
    return found


def answers(model: Path, threads: int = 1) -> Callable[[str], str]:
    """A function from what is said to the model's greedy answer."""
    import llama_cpp

    llama = llama_cpp.Llama(str(model), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

    def answer(say: str) -> str:
        out: Any = llama.create_chat_completion(
            [{"role": "user", "content": say}], temperature=0.0, repeat_penalty=1.0, max_tokens=MAX_TOKENS
        )
        return str(out["choices"][0]["message"]["content"])

    return answer


def score(task: Task, cases: Sequence[Case], answer: Callable[[str], str]) -> Score:
    """Exactly right means: the answer reads as what was wanted, nothing more or less."""
    misses = []
    for say, want in cases:
        got = answer(say)
        if task.read(got) != want:
            misses.append({"say": say, "want": want, "got": got})
    return Score(len(cases) - len(misses), len(cases), tuple(misses))


def digest(model: Path) -> str:
    return hashlib.sha256(model.read_bytes()).hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description="evaluate one of the demo models"
    )
    parser.add_argument("task", nargs="?", choices=list(TASKS), default="assistant")
    parser.add_argument("--model", type=Path, help="another file than the committed one")
    parser.add_argument("--threads", type=int, default=1, help="more make so small a model no faster")
    parser.add_argument("--quiet", action="store_true", help="figures only, no misses")
    parser.add_argument("--write", action="store_true", help="write training/evaluation-TASK.json")
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    model = args.model or task.model
    answer = answers(model, args.threads)
    result: dict[str, Any] = {"model": model.name, "sha256": digest(model)}
    for name, cases in sets(task).items():
        began = time.monotonic()
        scored = score(task, cases, answer)
        result[name] = {"right": scored.right, "total": scored.total, "share": round(scored.share, 4)}
        result[name]["misses"] = list(scored.misses)
        for miss in () if args.quiet else scored.misses:
            print(f"  {miss['say']}\n    want {json.dumps(miss['want'])}\n    got  {miss['got']!r}")
        print(
            f"{name}: {scored.right} of {scored.total} ({scored.share:.1%}), {time.monotonic() - began:.0f} s"
        )
    if args.write:
        task.result.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
