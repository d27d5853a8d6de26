"""Checks of config values that several keys share; each error names the key and the value."""

import difflib
import math
from typing import Iterable, List, Sequence

# Limit for layers whose width is a config key: more than anyone needs, but fits in memory.
MAX_CHANNELS = 65536


def nearest(name: object, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> List[str]:
    """
    The most similar known names, best first. A name that differs only in case and underscores is
    the only result: "crosskd" is CrossKD, not CKD.

    Args:
        cutoff: smallest similarity, 0 to 1
    """
    wanted, plain = _plain(name), {_plain(x): x for x in known}
    if wanted in plain:
        return [plain[wanted]]
    return [plain[x] for x in difflib.get_close_matches(wanted, plain, n=count, cutoff=cutoff)]


def _plain(name: object) -> str:
    return str(name).casefold().replace("_", " ")


def shown(names: Sequence[str], count: int = 3) -> str:
    """For a message, such as "a, b, c and 2 more"."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


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
        ValueError: not above 0, or not finite
    """
    if not 0 < value < math.inf:
        raise ValueError(
            f"{key} must be above 0, got {value}; it divides the logits of a softmax and must be "
            "finite."
        )


def check_weight(key: str, value: float) -> None:
    """
    Check the weight of one of several terms; 0 disables the term.

    Raises:
        ValueError: below 0, or not finite
    """
    if not 0 <= value < math.inf:
        raise ValueError(f"{key} must be 0 or above, got {value}; a weight must be finite.")


def check_range(key: str, value: float, low: float, high: float, why: str = "") -> None:
    """
    Args:
        low, high: the smallest and the largest value
        why: explanation at the end of the error

    Raises:
        ValueError: `value` is outside, or NaN
    """
    if not low <= value <= high:
        wanted = f"{low} or more" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"{key} must be {wanted}, got {value}{why and ': '}{why}.")
