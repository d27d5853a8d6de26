"""Checks of config values that several keys share; each error names the key and the value."""

from typing import Sequence


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """
    Raises:
        ValueError: `value` is none of `choices`
    """
    if value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}.")


def check_temperature(key: str, value: float) -> None:
    """
    Raises:
        ValueError: not above 0
    """
    if not value > 0:
        raise ValueError(f"{key} must be above 0, got {value}: it divides what goes into softmax.")
