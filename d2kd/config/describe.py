"""Config keys with their defaults and meaning, for a terminal."""

import textwrap
from fnmatch import fnmatchcase
from typing import Any, List, Mapping, Sequence

from detectron2.config import get_cfg

from ..heads.registry import head_names
from ..utils.checks import nearest
from .key_comments import meanings
from .load import leaves, load_config


def describe(patterns: Sequence[str] = ()) -> str:
    """
    Args:
        patterns: keys, groups of keys, or shell-style patterns; none: all keys that d2kd adds to
            Detectron2's, except those of single heads

    Returns:
        a line per key with its default, followed by its meaning

    Raises:
        ValueError: a pattern matches no key
    """
    values = dict(leaves(load_config()))
    known = list(values)
    if patterns:
        chosen = [key for pattern in patterns for key in _matching(pattern, known)]
    else:
        theirs = dict(leaves(get_cfg()))
        heads = tuple(f"DISTILL.{name}." for name in head_names())
        chosen = [x for x in known if x not in theirs and not x.startswith(heads)]
    known_texts = meanings()
    texts = {key: known_texts.get(_without_head(key), "") for key in chosen}
    return explained({key: values[key] for key in chosen}, {**known_texts, **texts})


def explained(values: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    """
    Args:
        values: key to default
        texts: key, or group of keys, to its meaning

    Returns:
        a line per key with its default, followed by its meaning; the meaning of a group comes
        before that of its first key
    """
    lines, groups = [], set()
    for key, value in values.items():
        group = key.rpartition(".")[0]
        parts = [texts.get(key, "")] if group in groups else [texts.get(group, ""), texts.get(key)]
        groups.add(group)
        lines.append(f"{key}: {value!r}")
        lines += textwrap.wrap(
            "; ".join(filter(None, parts)),
            96,
            initial_indent="    ",
            subsequent_indent="    ",
            break_on_hyphens=False,
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
        ValueError: no key matches; names the nearest one
    """
    found = [x for x in known if x.startswith(f"{pattern}.") or fnmatchcase(x, pattern)]
    if not found:
        groups = {key.rpartition(".")[0] for key in known}
        near = nearest(pattern, [*known, *groups])
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"There is no config key or group of keys {pattern!r}.{hint}")
    return found
