"""`fastgpt2 check`: whether the kernels compute what they should on this machine, and how fast they are."""

from fastgpt2.selfcheck.run import check

__all__ = ["check"]
