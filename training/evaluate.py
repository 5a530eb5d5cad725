"""Runs the committed GGUF through llama.cpp, greedy, and counts exactly right calls.

    python -m training.evaluate             print both figures and every miss
    python -m training.evaluate --write     and keep them in training/evaluation.json

Needs llama.cpp only: neither PyTorch nor the tokenizer's trainer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .generator import Generator, normalise
from .schema import Call, read_call

HERE = Path(__file__).parent
MODEL = HERE.parent / "models" / "demo-assistant.gguf"
HANDWRITTEN = HERE / "handwritten.jsonl"
RESULT = HERE / "evaluation.json"
HELD_OUT_COMMANDS = 1000
HELD_OUT_SEED = 63_000
MAX_TOKENS = 160

Case = tuple[str, Call]  # a sentence and the call it asks for


@dataclass(frozen=True)
class Score:
    """How many calls of a set were exactly right, and the others."""

    right: int
    total: int
    misses: tuple[dict[str, Any], ...]

    @property
    def share(self) -> float:
        return self.right / self.total


def handwritten() -> list[Case]:
    """The 50 sentences written by hand before the generator existed."""
    lines = HANDWRITTEN.read_text(encoding="utf-8").splitlines()
    return [(row["say"], row["call"]) for row in map(json.loads, lines)]


def avoided() -> frozenset[str]:
    """The handwritten sentences in the form in which the generator keeps clear of them."""
    return frozenset(normalise(say) for say, _ in handwritten())


def held_out(count: int = HELD_OUT_COMMANDS, seed: int = HELD_OUT_SEED) -> list[Case]:
    """Commands made from held-out templates and held-out names."""
    return [(e.say, e.call) for e in islice(Generator(seed, held_out=True, avoid=avoided()), count)]


def assistant(model: Path, threads: int = 2) -> Callable[[str], str]:
    """A function from a sentence to the model's greedy answer."""
    import llama_cpp

    llama = llama_cpp.Llama(str(model), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

    def answer(say: str) -> str:
        out: Any = llama.create_chat_completion(
            [{"role": "user", "content": say}], temperature=0.0, repeat_penalty=1.0, max_tokens=MAX_TOKENS
        )
        return str(out["choices"][0]["message"]["content"])

    return answer


def score(cases: Sequence[Case], answer: Callable[[str], str]) -> Score:
    """Exactly right means: the last line is JSON equal to the expected call, no key more or less."""
    misses = []
    for say, want in cases:
        got = answer(say)
        if read_call(got) != want:
            misses.append({"say": say, "want": want, "got": got})
    return Score(len(cases) - len(misses), len(cases), tuple(misses))


def digest(model: Path) -> str:
    return hashlib.sha256(model.read_bytes()).hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description="evaluate the demo model"
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write training/evaluation.json")
    args = parser.parse_args(argv)
    answer = assistant(args.model, args.threads)
    result: dict[str, Any] = {"model": args.model.name, "sha256": digest(args.model)}
    for name, cases in (("held_out", held_out()), ("handwritten", handwritten())):
        began = time.monotonic()
        scored = score(cases, answer)
        result[name] = {"right": scored.right, "total": scored.total, "share": round(scored.share, 4)}
        result[name]["misses"] = list(scored.misses)
        for miss in scored.misses:
            print(f"  {miss['say']}\n    want {json.dumps(miss['want'])}\n    got  {miss['got']!r}")
        print(
            f"{name}: {scored.right} of {scored.total} ({scored.share:.1%}), {time.monotonic() - began:.0f} s"
        )
    if args.write:
        RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
