"""The command line: `fastgpt2 generate | score | select | train | plot | check ...`. It alone prints."""

from fastgpt2.cli.main import main

__all__ = ["main"]
