"""`python -m training.train`: generator -> tokenizer -> network -> GGUF -> evaluation, by seed."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from . import evaluate, export, tokenizer, trainer
from .conversations import conversations
from .generator import Generator, normalise
from .model import Shape
from .trainer import Encoded, Plan

HERE = Path(__file__).parent
ROOT = HERE.parent
MODEL = ROOT / "models" / "demo-assistant.gguf"
VOCAB = 1024
TOKENIZER_CONVERSATIONS = 40_000


def handwritten_sentences() -> frozenset[str]:
    """Normalised; the generator must never write one of them."""
    lines = (HERE / "handwritten.jsonl").read_text(encoding="utf-8").splitlines()
    return frozenset(normalise(json.loads(line)["say"]) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=MODEL)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "training")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.cache.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    with (args.cache / "train.log").open("w", encoding="utf-8") as log_file:

        def log(line: str) -> None:
            print(line, flush=True)
            print(line, file=log_file, flush=True)

        avoid = handwritten_sentences()
        texts = (
            turn.content
            for turns in itertools.islice(
                conversations(Generator(args.seed, avoid=avoid), args.seed), TOKENIZER_CONVERSATIONS
            )
            for turn in turns
        )
        bpe = tokenizer.train(texts, VOCAB)
        bpe.save(str(args.cache / "tokenizer.json"))

        def encoded() -> Iterator[Encoded]:
            for turns in conversations(Generator(args.seed, avoid=avoid), args.seed):
                yield tokenizer.encode_chat(bpe, turns)

        shape = Shape(vocab=VOCAB)
        plan = Plan(steps=args.steps, seed=args.seed)
        model = trainer.train(shape, encoded(), plan, args.cache / "weights.pt", log)
        seconds = time.monotonic() - began
        log(f"trained in {seconds / 60:.1f} minutes on {args.threads} threads")
        export.write(args.output, shape, model.state_dict(), bpe, export.DEMO)
        log(f"wrote {args.output.name}, {args.output.stat().st_size} bytes")
    if args.output == MODEL:
        evaluate.main(["--write"])


if __name__ == "__main__":
    main()
