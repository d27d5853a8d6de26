"""Load a YAML and overrides; unknown keys are errors."""

import os
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import torch

import detectron2
from detectron2.config import CfgNode, get_cfg

from ..utils.checks import nearest
from ..utils.packaged import find_file
from ..utils.safe_yaml import read_yaml
from .distill_keys import add_distill_config

# What the configs that a newer Detectron2 saves have in addition to those of 0.5
NEWER_KEYS = (
    "DATALOADER.REPEAT_SQRT",
    "FLOAT32_PRECISION",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES",
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS",
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE",
    "SOLVER.BASE_LR_END",
    "SOLVER.NUM_DECAYS",
    "SOLVER.RESCALE_INTERVAL",
)


def load_config(config_file: str = "", opts: Sequence[Any] = ()) -> CfgNode:
    """
    Detectron2's and d2kd's defaults, then a YAML file, then overrides.

    Args:
        config_file: path of a YAML, or name of one of d2kd's own; "": none
        opts: key, value, key, value, ... as on the command line

    Raises:
        FileNotFoundError: no such YAML
        ValueError: a YAML that is empty or would run code, Python in its place, or an unknown key,
            with the nearest known one
    """
    cfg = get_cfg()
    add_distill_config(cfg)
    # Detectron2's default is "cuda" even on machines without a GPU.
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    if config_file:
        if config_file.endswith(".py"):
            raise ValueError(
                f"{config_file!r} is Python, such as a LazyConfig; a run is described by a YAML. "
                "DISTILL.TEACHER.CONFIG_FILE may name a LazyConfig."
            )
        config_file = find_file(config_file)
        if not os.path.isfile(config_file):
            raise FileNotFoundError(
                f"Config file {config_file!r} does not exist, not even among those of d2kd."
            )
        try:
            merge_mapping(cfg, read_yaml(config_file), config_file)
        except RecursionError:
            raise ValueError(f"{config_file} is nested too deeply, or contains itself.") from None
    merge_opts(cfg, opts, "the command line")
    return cfg


def merge_mapping(cfg: CfgNode, mapping: Dict[str, Any], source: str) -> None:
    """
    Merge keys and values that are nested as in a YAML into cfg.

    Raises:
        ValueError: an unknown key, or a value of the wrong type
    """
    _refuse_unknown(cfg, list(_unknown(cfg, mapping, source)), source)
    before = dict(leaves(cfg))
    try:
        cfg.merge_from_other_cfg(CfgNode(_like(cfg, mapping)))
    except (AssertionError, ValueError) as error:  # yacs: wrong type, a date, set or bytes
        raise ValueError(f"{source}: {error}") from None
    _refuse_none(cfg, before, source)


def merge_opts(cfg: CfgNode, opts: Sequence[Any], source: str) -> None:
    """
    Merge key, value, key, value, ... into cfg.

    Raises:
        ValueError: an odd number of words, an unknown key, or a value of the wrong type
    """
    if len(opts) % 2:
        raise ValueError(f"{source}: overrides come as KEY VALUE pairs, got {list(opts)}.")
    known = set(_names(cfg))
    _refuse_unknown(cfg, [str(key) for key in opts[0::2] if str(key) not in known], source)
    before = dict(leaves(cfg))
    for key, value in zip(opts[0::2], opts[1::2]):
        if key not in before:
            raise ValueError(f"{source}: {key} is a group of keys; name one of them, {key}.<KEY>.")
        try:
            cfg.merge_from_list([key, _like(before[key], value)])
        # Errors that yacs and its literal parser raise.
        except (AssertionError, MemoryError, RecursionError, TypeError, ValueError) as error:
            hint = _as_list(key, value) if isinstance(before[key], (list, tuple)) else ""
            raise ValueError(
                f"{source}: {key} cannot be {str(value)[:80]!r}: {error}{hint}"
            ) from None
    _refuse_none(cfg, before, source)


def _as_list(key: str, value: Any) -> str:
    """How a list is written on a command line, of which `value` may be one without its quotes."""
    if not isinstance(value, str):
        return ""
    entries = [x.strip(" '\"") for x in value.strip("[]() ").split(",")]
    return f'. A list is written {key} "{entries}"'


def _like(default: Any, value: Any) -> Any:
    """A value, or a mapping of them, with 3 as 3.0 where the default has a point, as yacs wants."""
    if isinstance(value, dict) and isinstance(default, dict):
        return {key: _like(default.get(key), x) for key, x in value.items()}
    is_whole = type(value) in (int, str) and str(value).lstrip("+-").isdecimal()
    return float(str(value)) if is_whole and isinstance(default, float) else value


def _unknown(
    node: CfgNode, mapping: Dict[str, Any], source: str, prefix: str = ""
) -> Iterator[str]:
    """Dotted names of the keys in `mapping` that are not in `node`."""
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if key not in node:
            yield name
        elif isinstance(node[key], CfgNode) and not isinstance(value, dict):
            keys = ", ".join(list(node[key])[:3])
            raise ValueError(f"{source}: {name} must be a mapping of {keys}, ..., got {value!r}.")
        elif isinstance(value, dict) and not isinstance(node[key], CfgNode):
            raise ValueError(
                f"{source}: {name} must be a value such as {node[key]!r}, not a mapping."
            )
        elif isinstance(value, dict):
            yield from _unknown(node[key], value, source, f"{name}.")


def _refuse_unknown(cfg: CfgNode, keys: List[str], source: str) -> None:
    """
    Raises:
        ValueError: if there are `keys`; names each with the nearest key of cfg
    """
    known = set(_names(cfg))
    lines = []
    for key in keys:
        near = nearest(key, known)
        hint = f" (did you mean {near[0]}?)" if near else ""
        hint = " (write it nested in YAML: one mapping per dot)" if key in known else hint
        if key in NEWER_KEYS:
            hint = f" (of a newer Detectron2 than {detectron2.__version__}, which is installed)"
        # YAML takes {SIZE: (96, 128)} for the keys "SIZE" and "128)"
        hint = " (inside {} YAML has no tuples: write [96, 128])" if key.endswith(")") else hint
        lines.append(f"  {key}{hint}")
    if any(x.startswith("DISTILL.") and x.split(".")[1] not in cfg.DISTILL for x in keys):
        lines.append("  Keys of a head of yours are known with --plugin FILE.")
    if lines:
        raise ValueError(f"{source} has unknown keys:\n" + "\n".join(lines))


def student_config(cfg: CfgNode) -> CfgNode:
    """The config of the student alone, a stock Detectron2 detector."""
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        cfg.MODEL.META_ARCHITECTURE = cfg.DISTILL.STUDENT_META_ARCHITECTURE
        cfg.DISTILL.HEADS = []
    return cfg


def _refuse_none(cfg: CfgNode, before: Dict[str, Any], source: str) -> None:
    """Refuse None for a key with a value: yacs accepts it, and it would fail somewhere else."""
    for key, value in leaves(cfg):
        if value is None and before.get(key) is not None:
            raise ValueError(f"{source}: {key} is None. Set a value, or leave the key out.")


def leaves(node: Dict[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    """Dotted names and values."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _names(node: Dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys and groups of keys."""
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{key}.")
