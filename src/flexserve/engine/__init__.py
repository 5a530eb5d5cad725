"""llama.cpp computing on Flex-Mem, and everything around a prompt: template, tokens, sampling, text."""
