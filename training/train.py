"""`python -m training.train`: generator -> tokenizer -> network -> GGUF -> evaluation, by seed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import torch

from . import evaluate, export, tokenizer, trainer
from .conversations import conversations
from .generator import Generator
from .model import Shape
from .tokenizer import Turn
from .trainer import Encoded, Plan

ROOT = Path(__file__).parents[1]
VOCAB = 1024
TOKENIZER_CONVERSATIONS = 40_000


def check_lines(seed: int) -> list[str]:
    """Sentences and answers of both sides, and lines of characters that nobody trained on."""
    lines = [e.say for e in islice(Generator(seed, held_out=True), 2500)]
    lines += [e.answer for e in islice(Generator(seed), 2500)]
    rng = Random(seed)
    odd = "abcXYZ019 \t\n  .,;'\"{}[]_-éßłñ中文日本語한🙂🇩🇪½٣Ⅷ'll't\u00a0\u200b\u3000"
    return lines + ["".join(rng.choice(odd) for _ in range(rng.randint(1, 40))) for _ in range(3000)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=evaluate.MODEL)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "training", help="log and checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.cache.mkdir(parents=True, exist_ok=True)
    avoid = evaluate.avoided()
    began = time.monotonic()

    def spoken() -> Iterator[list[Turn]]:
        return conversations(Generator(args.seed, avoid=avoid), args.seed)

    with (args.cache / "train.log").open("w", encoding="utf-8") as log_file:

        def log(line: str) -> None:
            print(line, flush=True)
            print(line, file=log_file, flush=True)

        texts = [turn.content for turns in islice(spoken(), TOKENIZER_CONVERSATIONS) for turn in turns]
        bpe = tokenizer.train(texts, VOCAB)
        bpe.save(str(args.cache / "tokenizer.json"))

        def encoded() -> Iterator[Encoded]:
            cut = Random(f"{args.seed}/cut")
            return (tokenizer.encode_chat(bpe, turns, cut) for turns in spoken())

        shape = Shape(vocab=VOCAB)
        plan = Plan(steps=args.steps, seed=args.seed)
        model = trainer.train(shape, encoded(), plan, args.cache / "weights.pt", log)
        log(f"trained in {(time.monotonic() - began) / 60:.1f} minutes on {args.threads} threads")

        export.write(args.output, shape, model.state_dict(), bpe, export.DEMO)
        log(f"wrote {args.output.name}, {args.output.stat().st_size} bytes")
        lines = check_lines(args.seed)
        export.check_tokens(args.output, bpe, lines)
        prompts = [tokenizer.encode_chat(bpe, turns)[0] for turns in islice(spoken(), 20)]
        worst = export.check_logits(args.output, model, prompts)
        log(
            f"llama.cpp: {len(lines)} lines give the same tokens, probabilities differ by at most {worst:.4f}"
        )
    evaluate.main(["--model", str(args.output), *(["--write"] if args.output == evaluate.MODEL else [])])


if __name__ == "__main__":
    main()
