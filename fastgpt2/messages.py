"""Pieces of error messages."""

from __future__ import annotations


def listed(items: list[str], limit: int = 6) -> str:
    """The first items with commas between, and how many more there are."""
    shown = ", ".join(items[:limit]) or "none"
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown


def counted(number: int, noun: str) -> str:
    """A number of things: "1 file", "2 files", "3 processes"."""
    return f"{number:,} {noun if number == 1 else noun + ('es' if noun.endswith('s') else 's')}"


def shown(value: object) -> str:
    """A value as an error shows it: its beginning, where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no int of thousands of digits
        text = f"an int of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def first_line(error: BaseException) -> str:
    """What another library's error says, as part of a sentence of ours: its first line, cut where it is long."""
    text = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".:; ")
    return text if len(text) <= 200 else f"{text[:180]}... ({len(text)} characters)"
