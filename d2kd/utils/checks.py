"""Checks of config values that several keys share; each error names the key and the value."""

import difflib
import math
from typing import Iterable, List, Sequence

# Of a layer that a key makes: beyond what anybody means, below what no memory holds.
MAX_CHANNELS = 65536


def nearest(name: object, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> List[str]:
    """
    The known names that somebody may have meant, most alike first; one that differs in case and
    underscores alone is the only one: "crosskd" is CrossKD, and not CKD.

    Args:
        cutoff: 0 to 1, how alike they are at least
    """
    wanted, plain = _plain(name), {_plain(x): x for x in known}
    if wanted in plain:
        return [plain[wanted]]
    return [plain[x] for x in difflib.get_close_matches(wanted, plain, n=count, cutoff=cutoff)]


def _plain(name: object) -> str:
    return str(name).casefold().replace("_", " ")


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
            f"{key} must be above 0, got {value}: it is finite and divides what goes into softmax."
        )


def check_weight(key: str, value: float) -> None:
    """
    Of one of several terms, which 0 leaves out.

    Raises:
        ValueError: below 0, or not finite
    """
    if not 0 <= value < math.inf:
        raise ValueError(f"{key} must be 0 or above, got {value}: it is a finite weight.")


def check_range(key: str, value: float, low: float, high: float, why: str = "") -> None:
    """
    Args:
        low, high: the smallest and the largest value
        why: the end of the error

    Raises:
        ValueError: `value` is outside, or NaN
    """
    if not low <= value <= high:
        wanted = f"{low} or more" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"{key} must be {wanted}, got {value}{why and ': '}{why}.")
