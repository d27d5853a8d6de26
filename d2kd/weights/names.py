"""Find the weights in a checkpoint of any tool, and explain why none fit."""

import logging
import re
from collections import Counter
from typing import Any, Collection, Dict, List, Mapping

import numpy as np
from torch import Tensor

logger = logging.getLogger(__name__)

WANTED = 'd2kd looks for {"model": {name: tensor, ...}}, as Detectron2 saves it'
# Keys by which a tool's checkpoints are known.
_TOOLS = (
    ({"meta"}, "mmdetection (OpenMMLab)"),
    ({"pytorch-lightning_version"}, "PyTorch Lightning"),
    ({"lr_scheduler", "epoch"}, "torchvision's references or DETR"),
    ({"arch"}, "timm or PyTorch's examples"),
)
# Parts of d2kd's own checkpoints.
_OURS = ("model", "distill_heads")
# torchvision's and timm's ResNets, which Detectron2 has a script for.
_TORCHVISION = re.compile(r"layer[1-4]\.\d+\.conv\d\.weight")


def with_model(data: Dict[str, Any], path: str) -> Dict[str, Any]:
    """
    Args:
        data: content of a file
        path: the file, for the log

    Returns:
        the content with its one set of named weights under "model"

    Raises:
        TypeError: it has none, or several and none of them under "model"
    """
    if "model" in data:
        others = [k for k, v in data.items() if k not in _OURS and _is_weights(v)]
        if others:
            logger.warning(f"{path}: 'model' is read; it also has weights under {others}.")
        return data
    if _is_weights(data):
        return {"model": data}
    sets = [k for k, v in data.items() if _is_weights(v)]
    if len(sets) == 1:
        logger.info(f"{path}: the weights are read from its {sets[0]!r}.")
        return {**{k: v for k, v in data.items() if k != sets[0]}, "model": data[sets[0]]}
    if sets:
        listed = ", ".join(f"{k!r} ({len(data[k])} tensors)" for k in sets)
        raise TypeError(
            f"it has several sets of weights: {listed}. Save the one that you mean: "
            f'torch.save({{"model": checkpoint["{sets[0]}"]}}, "weights.pth").'
        )
    listed = ", ".join(f"{k!r} ({type(v).__name__})" for k, v in list(data.items())[:6])
    raise TypeError(f"it has no named weights, but {listed or 'nothing'}; {WANTED}.")


def _is_weights(value: Any) -> bool:
    named = isinstance(value, dict) and value
    return bool(named) and all(isinstance(x, (Tensor, np.ndarray)) for x in value.values())


def check_named(model: Any) -> None:
    """
    Raises:
        TypeError: what a file has under "model" are not named weights
    """
    if not isinstance(model, dict):
        raise TypeError(f'its "model" is a {type(model).__name__}; {WANTED}.')
    for key, value in model.items():
        if not isinstance(value, (Tensor, np.ndarray)):
            kind = type(value).__name__
            raise TypeError(f"it has {key!r}, a {kind}, where a tensor should be; {WANTED}.")


def without_prefix(state: Dict[str, Any], wanted: Collection[str]) -> Dict[str, Any]:
    """
    Remove prefixes that wrappers add to names ("module.", "model.", ...), if the names then fit.

    Args:
        state: name to value
        wanted: names of the detector
    """
    found = state
    while found and not any(k in wanted for k in found):
        prefix = next(iter(found)).partition(".")[0] + "."
        if not all(k.startswith(prefix) and k != prefix for k in found):
            return state
        found = {k[len(prefix) :]: v for k, v in found.items()}
    if len(found) and found is not state:
        taken = next(iter(state))[: -len(next(iter(found)))]
        logger.info(f"{taken!r} is taken off the names of all weights.")
    return found


def describe(checkpoint: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Description of a checkpoint: the tool it seems to be of, number and names of its weights."""
    tools = [name for keys, name in _TOOLS if keys <= set(checkpoint)]
    names = list(state)
    of = f"a checkpoint of {tools[0]}: " if tools else ""
    shown = f" such as {', '.join(names[:: max(len(names) // 2, 1)][:2])}" if names else ""
    return f"{of}{len(names)} tensors{shown}"


def advice(names: Collection[str], wanted: Collection[str]) -> str:
    """What to do when no name fits."""
    prefixes = Counter(x[: -len(end)] for x in names for end in _ends(x) if end in wanted)
    if prefixes:
        prefix, count = prefixes.most_common(1)[0]
        return (
            f"{count} of its names would fit without {prefix!r}: save those alone, without it, "
            'under "model".'
        )
    ends = {end for name in wanted for end in _ends(name)}
    if 2 * sum(name in ends for name in names) > len(names):
        return (
            "Its names are ends of the model's, as of a backbone saved alone: to have them "
            "matched so, write ?matching_heuristics=True behind the path."
        )
    if any(_TORCHVISION.match(x) for x in names):
        return (
            "These are names of torchvision and timm; convert-torchvision-to-d2.py in the tools of "
            "Detectron2's repository makes a .pkl of such a backbone."
        )
    return "d2kd renames no weights of other projects: train or convert the detector in Detectron2."


def _ends(name: str) -> List[str]:
    """a.b.c -> b.c, c"""
    return [name[dot.end() :] for dot in re.finditer(r"\.", name)]
