"""Building blocks of error messages."""

from __future__ import annotations


def listed(items: list[str], limit: int = 6) -> str:
    """The first `limit` items separated by commas, and how many more there are."""
    shown = ", ".join(items[:limit]) or "none"
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown


def counted(number: int, noun: str) -> str:
    """A number of things: "1 file", "2 files", "3 processes"."""
    return f"{number:,} {noun if number == 1 else noun + ('es' if noun.endswith('s') else 's')}"


def shown(value: object) -> str:
    """A value as an error shows it: only the beginning if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        text = f"an int of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def first_line(error: BaseException) -> str:
    """The first line of another library's error, cut if it is long, for use inside a sentence of ours."""
    text = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".:; ")
    return text if len(text) <= 200 else f"{text[:180]}... ({len(text)} characters)"
