"""`python -m training.train [TASK]`: samples -> tokenizer -> network -> GGUF -> evaluation, by seed."""

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
from .export import Card
from .model import Shape
from .task import HERE, Task
from .tasks import TASKS
from .tokenizer import Turn
from .trainer import Encoded, Plan

TOKENIZER_CONVERSATIONS = 40_000


def check_lines(task: Task, seed: int) -> list[str]:
    """Sentences and answers of both sides, and lines of characters that nobody trained on."""
    lines = [sample.say for sample in islice(task.samples(seed, True), 2500)]
    lines += [sample.answer for sample in islice(task.samples(seed, False), 2500)]
    rng = Random(seed)
    odd = "abcXYZ019 \t\n  .,;'\"{}[]_-éßłñ中文日本語한🙂🇩🇪½٣Ⅷ'll't\u00a0\u200b\u3000"
    return lines + ["".join(rng.choice(odd) for _ in range(rng.randint(1, 40))) for _ in range(3000)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("task", nargs="?", choices=list(TASKS), default="assistant")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, help="models/demo-TASK.gguf, evaluated, without it")
    parser.add_argument(
        "--cache", type=Path, default=HERE.parent / ".cache" / "training", help="log, checkpoint"
    )
    args = parser.parse_args()
    task = TASKS[args.task]
    torch.set_num_threads(args.threads)
    args.cache.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def spoken() -> Iterator[list[Turn]]:
        return conversations(task, args.seed)

    with (args.cache / f"{task.name}.log").open("w", encoding="utf-8") as log_file:

        def log(line: str) -> None:
            print(line, flush=True)
            print(line, file=log_file, flush=True)

        texts = [turn.content for turns in islice(spoken(), TOKENIZER_CONVERSATIONS) for turn in turns]
        bpe = tokenizer.train(texts, task.vocab, task.spaced, task.fixed)
        bpe.save(str(args.cache / f"{task.name}-tokenizer.json"))

        def encoded() -> Iterator[Encoded]:
            chat = tokenizer.Chat(bpe, task.copied, Random(f"{args.seed}/cut"))
            return (chat.encode(turns) for turns in spoken())

        shape = Shape(vocab=bpe.get_vocab_size(), **task.sizes)
        plan = Plan(steps=args.steps or task.steps, seed=args.seed)
        checkpoint = args.cache / f"{task.name}.pt"
        twins = tokenizer.spaced(bpe)
        model = trainer.train(shape, encoded(), twins, plan, checkpoint=checkpoint, log=log)
        log(f"trained in {(time.monotonic() - began) / 60:.1f} minutes on {args.threads} threads")

        output = args.output or task.model
        export.write(output, shape, model.state_dict(), bpe, Card(task.title, task.description))
        log(f"wrote {output.name}, {output.stat().st_size} bytes")
        lines = check_lines(task, args.seed)
        export.check_tokens(output, bpe, lines)
        chat = tokenizer.Chat(bpe)
        # Up to the end of an answer: what comes after that was never learned, and rounding decides.
        prompts = [chat.encode(turns)[0][:-1] for turns in islice(spoken(), 20)]
        worst = export.check_logits(output, model, prompts)
        log(
            f"llama.cpp: {len(lines)} lines give the same tokens, probabilities differ by at most {worst:.4f}"
        )
    evaluate.main([task.name, "--quiet", *(["--model", str(output)] if args.output else ["--write"])])


if __name__ == "__main__":
    main()
