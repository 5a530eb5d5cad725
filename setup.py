"""The C part; everything else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "flexserve.flexmem._ggml_arena",  # loaded with ctypes, not imported
            sources=["src/flexserve/flexmem/ggml_arena.c"],
            depends=["src/flexserve/flexmem/ggml_arena.c"],
            extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fvisibility=default"],
        )
    ]
)
