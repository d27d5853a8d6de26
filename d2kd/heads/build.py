"""From a name in DISTILL.HEADS to a head."""

from typing import List

from torch import nn
from torch.nn.parameter import is_lazy

from detectron2.config import CfgNode

from ..pairing.pair import DistillPair
from ..utils.checks import shown
from .fit import misfit
from .keys import check_arguments, head_arguments, key_of, keys_in_errors, knobs
from .registry import compares_logits, head_class, head_names


def build_head(name: str, cfg: CfgNode, pair: DistillPair) -> nn.Module:
    """
    Build the head `name` of DISTILL.HEADS for a pair of detectors.

    Raises:
        ValueError: the head is unknown, or does not take such a pair, when the error names those
            that do; or a value of one of its keys is outside its range
    """
    problem = misfit(name, cfg, pair)
    if problem:
        fit = ", ".join(fitting(cfg, pair))
        raise ValueError(f"DISTILL.HEADS: {problem} Heads that fit: {fit}.")
    head = _build(name, cfg, pair)
    lazy = [k for k, p in head.named_parameters() if is_lazy(p)]
    if lazy:
        raise TypeError(
            f"{type(head).__name__}: {shown(lazy)} gets its shape in the first forward, after the "
            "optimizer is built and before a checkpoint is loaded. Take a layer that is not lazy: "
            "each of `levels` has student_channels and teacher_channels."
        )
    return head


def fitting(cfg: CfgNode, pair: DistillPair) -> List[str]:
    """Names of the heads that can be built for the pair, with the keys of cfg."""
    names = []
    for name in head_names():
        try:
            if misfit(name, cfg, pair) is None:
                _build(name, cfg, pair)
                names.append(name)
        except Exception:  # what a head has to say against the pair, or one of a user's
            pass
    return names


def _build(name: str, cfg: CfgNode, pair: DistillPair) -> nn.Module:
    head = head_class(name)
    if compares_logits(head):
        pair = pair.in_common_classes
    if hasattr(head, "add_config"):  # which reads itself what it has written
        return head(cfg, pair)
    with keys_in_errors(key_of(head), knobs(head)):
        if hasattr(head, "from_config"):
            arguments = head.from_config(cfg, pair)
        else:
            arguments = head_arguments(head, cfg, pair)
        check_arguments(head, arguments)
        return head(**arguments)
