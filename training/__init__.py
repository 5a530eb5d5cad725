"""The demo model's training: text generator, tokenizer, network, GGUF export and evaluation.

Not part of the installed package; `python -m training.train` from the repository's root runs all of it.
"""
