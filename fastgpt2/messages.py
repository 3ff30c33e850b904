"""Pieces of error messages."""

from __future__ import annotations


def listed(items: list[str]) -> str:
    """The first items with commas between, and how many more there are."""
    shown = ", ".join(items[:6]) or "none"
    return f"{shown} and {len(items) - 6} more" if len(items) > 6 else shown


def first_line(error: BaseException) -> str:
    """What another library's error says, as part of a sentence of ours."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".:; ")
