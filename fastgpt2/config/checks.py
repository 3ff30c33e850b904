"""Helpers with which the configurations check their fields."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """Raise ValueError with this message if the condition does not hold."""
    if not condition:
        raise ValueError(message)


def is_int(value: object) -> bool:
    """Whether the value is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether the value is an int or a float and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
