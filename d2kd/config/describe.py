"""Config keys with their defaults and meaning, for a terminal."""

import textwrap
from fnmatch import fnmatchcase
from typing import List, Sequence

from detectron2.config import get_cfg

from ..heads.registry import head_names
from ..utils.checks import nearest
from .key_comments import meanings
from .load import leaves, load_config


def describe(patterns: Sequence[str] = ()) -> str:
    """
    Args:
        patterns: keys, groups of keys, or patterns as in a shell; none: all that d2kd adds to
            Detectron2's, but for those of single heads

    Returns:
        a line for each key with its default, and below it its meaning

    Raises:
        ValueError: a pattern that fits no key
    """
    values = dict(leaves(load_config()))
    known = list(values)
    if patterns:
        chosen = [key for pattern in patterns for key in _matching(pattern, known)]
    else:
        theirs = dict(leaves(get_cfg()))
        heads = tuple(f"DISTILL.{name}." for name in head_names())
        chosen = [x for x in known if x not in theirs and not x.startswith(heads)]
    texts, lines = meanings(), []
    for key in dict.fromkeys(chosen):
        lines.append(f"{key}: {values[key]!r}")
        # What a group of keys is for stands before its first one.
        parent = texts.pop(key.rpartition(".")[0], "")
        text = "; ".join(filter(None, (parent, texts.get(_without_head(key), ""))))
        lines += textwrap.wrap(
            text, 96, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
        )
    return "\n".join(lines)


def _without_head(key: str) -> str:
    """DISTILL.MGD.SCHEDULE.DECAY -> DISTILL.<HEAD>.SCHEDULE.DECAY"""
    parts = key.split(".")
    if parts[0] == "DISTILL" and "SCHEDULE" in parts:
        parts[1] = "<HEAD>"
    return ".".join(parts)


def _matching(pattern: str, known: List[str]) -> List[str]:
    """
    Raises:
        ValueError: no key fits, with the nearest ones
    """
    found = [x for x in known if x.startswith(f"{pattern}.") or fnmatchcase(x, pattern)]
    if not found:
        groups = {key.rpartition(".")[0] for key in known}
        near = nearest(pattern, [*known, *groups])
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"No config key is {pattern!r}, or below it.{hint}")
    return found
