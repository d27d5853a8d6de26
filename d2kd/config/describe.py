"""Config keys with their defaults and meaning, read from the code that declares them."""

import inspect
import re
import textwrap
from fnmatch import fnmatchcase
from typing import Dict, List, Sequence

import detectron2.config.defaults
from detectron2.config import get_cfg

from ..data.data_keys import add_data_config
from ..heads.registry import head_names
from ..modeling.model_keys import add_model_config
from ..schedule import add_schedule_config
from ..utils.checks import nearest
from ..views.region_sampler import RegionSampler
from . import distill_keys
from .load import leaves, load_config

_NODE = re.compile(r"node = cfg\.([\w.]+) = CfgNode\(\)")
_ASSIGNMENT = re.compile(r"(?:(cfg|_C)|node)\.([\w.]+) = ([^#]*)(?:#\s*(.*))?")
_FIELD = re.compile(r"(\w+): \w+ = [^#]*")


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


def meanings() -> Dict[str, str]:
    """Key to the comment that stands above it, or behind it, where it is declared."""
    found = _comments(inspect.getsource(detectron2.config.defaults), "")
    for function in (add_data_config, add_model_config, distill_keys.add_distill_config):
        found.update(_comments(inspect.getsource(function), ""))
    found.update(_comments(inspect.getsource(add_schedule_config), "DISTILL.<HEAD>."))
    found.update(_comments(inspect.getsource(RegionSampler), "DISTILL.REGIONS."))
    return found


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


def _comments(source: str, prefix: str) -> Dict[str, str]:
    """
    Args:
        source: of code that declares keys
        prefix: of keys that it assigns to `node`
    """
    found: Dict[str, str] = {}
    above: List[str] = []
    for line in map(str.strip, source.splitlines()):
        node, assignment = _NODE.match(line), _ASSIGNMENT.match(line)
        field = _FIELD.match(line)
        if line.startswith("#"):
            rule = not re.search(r"\w", line)  # above and below the title of a chapter
            above = [] if rule else [*above, line.lstrip("# ")]
            continue
        if node:
            prefix = f"{node[1]}."
        elif assignment:
            root, name, _, behind = assignment.groups()
            key = name if root else prefix + name
            found[key] = " ".join([*above, behind or ""]).strip()
        elif field:
            found[prefix + field[1].upper()] = " ".join(above)
        above = []
    return found
