"""Distillers of toy detectors, what a step of theirs loses, and pairs that heads are offered."""

from typing import Any, Dict, List, Sequence

import torch
from torch import Tensor, nn

from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2kd.heads import DetectorInfo, DistillPair
from d2kd.pairing.levels import pair_levels

from .toys import distill_config

# What a pair_of() is made of: detectors that provide what a two-stage and a dense one do.
TWO_STAGE = {
    "name": "GeneralizedRCNN",
    "two_stage": True,
    "provides": frozenset({"features", "regions", "roi_predictions"}),
    "num_classes": 3,
    "box_weights": (10.0, 10.0, 5.0, 5.0),
}
DENSE = {
    "name": "RetinaNet",
    "provides": frozenset({"features", "dense", "regions"}),
    "num_classes": 3,
}


def pair_of(student: Dict[str, Any], teacher: Dict[str, Any]) -> DistillPair:
    """
    Args:
        student, teacher: of DetectorInfo, all but the shapes
    """
    shapes = {"p3": ShapeSpec(channels=4, stride=8)}
    infos = [DetectorInfo(shapes=shapes, **x) for x in (student, teacher)]
    return DistillPair(*infos, pair_levels(shapes, shapes))


def build_distiller(
    student: str, opts: Sequence[Any], heads: Sequence[str], **values: Any
) -> nn.Module:
    """
    Args:
        student: name of a toy detector
        opts: DISTILL.TEACHER.*, as write_teacher gives them
        values: of keys, with __ in place of a dot
    """
    torch.manual_seed(0)
    return build_model(distill_config(student, opts, heads, **values)).train()


def losses_of(distiller: nn.Module, inputs: List[Dict[str, Any]]) -> Dict[str, Tensor]:
    torch.manual_seed(1)  # which proposals are sampled
    with EventStorage():
        return distiller(inputs)
