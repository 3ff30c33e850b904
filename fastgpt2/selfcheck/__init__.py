"""`fastgpt2 check`: tests on this machine that the kernels are correct, and measures how fast they are."""

from fastgpt2.selfcheck.run import check

__all__ = ["check"]
