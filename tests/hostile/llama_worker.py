"""Loads GGUF files with llama.cpp and uses them, one after the other: the victim of test_gguf_mutations.py.

Run as a program: a line with a path in, a line "used" or "refused" out. If it dies, the file was harmful.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

import llama_cpp

TEXTS = (b"", b"\n", b"Hello  <|x|> \xc4\x80\xc4\x81", "é🙂 \t\x00end".encode())


ENCODERS = (b"bert", b"nomic-bert")


def use(path: str) -> str:
    params = llama_cpp.llama_model_default_params()
    params.use_mmap = False
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not model:
        return "refused"
    vocab = llama_cpp.llama_model_get_vocab(model)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_threads, settings.n_threads_batch = 64, 32, 1, 1
    arch = ctypes.create_string_buffer(64)
    llama_cpp.llama_model_meta_val_str(model, b"general.architecture", arch, 64)
    settings.embeddings = arch.value in ENCODERS
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        llama_cpp.llama_model_free(model)
        return "refused"
    buffer = (llama_cpp.llama_token * 256)()
    for text in TEXTS:
        for special in (False, True):
            count = llama_cpp.llama_tokenize(vocab, text, len(text), buffer, 256, special, special)
            piece = ctypes.create_string_buffer(256)
            for token in buffer[: max(count, 0)]:
                llama_cpp.llama_token_to_piece(vocab, token, piece, 256, 0, special)
    last = llama_cpp.llama_vocab_n_tokens(vocab) - 1
    for tokens in ([0, last, 1], [last]):
        batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * len(tokens))(*tokens), len(tokens))
        if llama_cpp.llama_decode(context, batch) == 0:
            if settings.embeddings:
                llama_cpp.llama_get_embeddings_seq(context, 0)
            else:
                llama_cpp.llama_get_logits_ith(context, -1)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return "used"


def main() -> None:
    os.environ["GGML_NO_BACKTRACE"] = "1"  # an abort would start a debugger
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    quiet = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    for line in sys.stdin:
        signal.alarm(20)  # a hang is a harm too: this kills us
        sys.stdout.write(use(line.rstrip("\n")) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
