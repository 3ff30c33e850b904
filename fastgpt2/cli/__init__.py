"""The command line: `fastgpt2 generate | score | select | train | check | warmup | info | convert`. It alone prints."""

from fastgpt2.cli.main import main

__all__ = ["main"]
