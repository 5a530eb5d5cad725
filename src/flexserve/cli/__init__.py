"""The command line: one file per verb."""

from __future__ import annotations


def main() -> None:
    """Entry point of `flexserve`."""
    from .main import cli

    cli(prog_name="flexserve")
