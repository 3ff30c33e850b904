"""The command line, `fastgpt2 COMMAND`. No other part of the package prints."""

from fastgpt2.cli.main import main

__all__ = ["main"]
