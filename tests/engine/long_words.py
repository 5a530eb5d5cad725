"""Tokenises the longest words allowed, as the secure world does. Run as a program: model, character."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import llama_cpp

from flexserve.engine import llama
from flexserve.errors import InvalidRequest


def main() -> None:
    llama.start()
    path, char = sys.argv[1:]
    model = llama.Model.from_file(Path(path), load_mode=llama_cpp.LLAMA_LOAD_MODE_NONE)

    def tokenize() -> None:
        try:
            model.vocab.tokenize(char * (llama.MAX_RUN_CHARS + 1), add_special=True, parse_special=False)
        except InvalidRequest:
            print("refused", flush=True)
        longest = char * llama.MAX_RUN_CHARS
        model.vocab.tokenize(
            longest + ("x" if char.isspace() else "\n") * llama.MAX_RUN_CHARS + longest,
            add_special=True,
            parse_special=False,
        )
        print("allowed", flush=True)

    threading.stack_size(llama.STACK_BYTES)
    thread = threading.Thread(target=tokenize)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
