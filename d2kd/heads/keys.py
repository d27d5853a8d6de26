"""
The config keys of a head, DISTILL.<NAME>.*, derived from the signature of its constructor.

An argument with a default is a key: of `mask_ratio: float = 0.65` the key is MASK_RATIO, and of
`mask: MaskRule = MaskRule()`, a dataclass, MASK.RATIO and so on, one for each of its fields. An
argument without a default is a fact about the detectors: `levels`, `sampler`, or one that the
head's from_config adds.
"""

import inspect
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any, Dict, Iterable, Iterator, Type

from torch import nn

from detectron2.config import CfgNode

from ..pairing.pair import DistillPair
from ..views import RegionSampler


def knobs(head: Type[nn.Module]) -> Dict[str, Any]:
    """The constructor's arguments that are keys, with their defaults."""
    parameters = inspect.signature(head.__init__).parameters.values()
    return {p.name: _default(p) for p in parameters if p.default is not p.empty}


def _default(argument: inspect.Parameter) -> Any:
    """Of `eps: float = 1` it is 1.0: a key takes no values of another type than its default."""
    is_float = argument.annotation in (float, "float") and type(argument.default) is int
    return float(argument.default) if is_float else argument.default


# What a YAML can have for a key.
VALUES = (bool, int, float, str, list, tuple, type(None))

# Of every head, and no arguments: the Distiller reads them.
OF_THE_DISTILLER = ("LOSS_WEIGHT", "REFERENCE_PIXELS", "SCHEDULE")


def add_head_keys(node: CfgNode, head: Type[nn.Module]) -> None:
    """
    Write a head's keys and their defaults into the node DISTILL.<NAME>.

    Raises:
        ValueError: an argument of its constructor that can be no key of its own
    """
    if hasattr(head, "add_config"):
        head.add_config(node)
        return
    node.LOSS_WEIGHT = float(getattr(head, "loss_weight", 1.0))
    if getattr(head, "sums_over_cells", False):
        node.REFERENCE_PIXELS = 0
    for name, default in knobs(head).items():
        _check_key(head, name, default)
        if is_dataclass(default):
            node[name.upper()] = CfgNode({k.upper(): v for k, v in vars(default).items()})
        else:  # a YAML has lists
            node[name.upper()] = list(default) if isinstance(default, tuple) else default


def _check_key(head: Type[nn.Module], name: str, default: Any) -> None:
    key, argument = f"{key_of(head)}.{name.upper()}", f"{head.__name__}.__init__: {name!r}"
    if name.upper() in OF_THE_DISTILLER:
        raise ValueError(
            f"{argument} cannot be an argument: {key} is read by the Distiller, which multiplies "
            "the loss by weight and schedule. The default of LOSS_WEIGHT is the class attribute "
            "loss_weight; take another name for what the head itself reads."
        )
    others = [x for x in knobs(head) if x != name and x.upper() == name.upper()]
    if others:
        raise ValueError(f"{argument} and {others[0]!r} would be one key, {key}: rename one.")
    is_node = is_dataclass(default) and not isinstance(default, type)
    for value in vars(default).values() if is_node else (default,):
        if type(value) not in VALUES:
            raise ValueError(
                f"{argument} has the default {value!r:.60}, which is no value of a key, and {key} "
                "is one. A key is a number, a word, True, False, None or a list of such; an "
                "instance of a dataclass is a group of keys. Make anything else in the constructor."
            )


def head_arguments(
    head: Type[nn.Module], cfg: CfgNode, pair: DistillPair, **facts: Any
) -> Dict[str, Any]:
    """
    The arguments of a head's constructor: its keys in cfg, and facts about the detectors.

    Args:
        facts: what a from_config knows better, or in addition

    Raises:
        ValueError: a value outside its range
    """
    key, keys = key_of(head), knobs(head)
    wanted = inspect.signature(head.__init__).parameters.keys() - keys.keys()
    if "levels" in wanted:
        facts.setdefault("levels", pair.levels)
    if "sampler" in wanted:
        facts.setdefault("sampler", RegionSampler.from_config(cfg, pair.student))
    for name, default in keys.items():
        value = cfg.DISTILL[key.partition(".")[2]][name.upper()]
        if is_dataclass(default):
            fields = {k.lower(): v for k, v in value.items()}
            with keys_in_errors(f"{key}.{name.upper()}", fields):
                value = type(default)(**fields)
        facts.setdefault(name, value)
    return facts


def check_arguments(head: Type[nn.Module], arguments: Dict[str, Any]) -> None:
    """
    Raises:
        TypeError: the head's constructor wants another, which nothing gives
    """
    for name, p in inspect.signature(head).parameters.items():
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            if name not in arguments:
                raise TypeError(
                    f"{head.__name__}.__init__: nothing gives {name!r}. With a default it is the "
                    f"key {key_of(head)}.{name.upper()}; without one it must be a fact about the "
                    "detectors: `levels`, `sampler`, or what from_config returns."
                )


def key_of(head: Type[nn.Module]) -> str:
    """MGDHead: "DISTILL.MGD" """
    return f"DISTILL.{head.__name__[: -len('Head')]}"


@contextmanager
def keys_in_errors(key: str, names: Iterable[str]) -> Iterator[None]:
    """Let a ValueError that begins with one of these arguments begin with its key, under `key`."""
    try:
        yield
    except ValueError as error:
        name, space, rest = str(error).partition(" ")
        if name not in names:
            raise
        raise ValueError(f"{key}.{name.upper()}{space}{rest}") from error
