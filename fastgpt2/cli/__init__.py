"""The command line: `fastgpt2 generate | train | check | info | convert`. The only part of the package that prints."""

from fastgpt2.cli.main import main

__all__ = ["main"]
