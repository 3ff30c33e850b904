"""What the configurations check their fields with."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """ValueError with this message where the condition does not hold."""
    if not condition:
        raise ValueError(message)


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
