"""Small detectors of every family, and views of them."""

from typing import Any, Dict, FrozenSet, List

import pytest
import torch
from torch import nn

import detectron2.modeling
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes

from d2kd import DetectorView
from d2kd.views import find_view

from .toys import GROUP_NORM, batch, detector_config

needs_fcos = pytest.mark.skipif(
    not hasattr(detectron2.modeling, "FCOS"), reason="this Detectron2 has no FCOS"
)
DENSE = ["retinanet", pytest.param("fcos", marks=needs_fcos)]
TWO_STAGE = ["faster_rcnn", "mask_rcnn", "cascade_rcnn"]
OF_REGIONS = frozenset({"roi_features", "regions", "region_vectors"})
OF_DENSE = OF_REGIONS | {"features", "dense", "anchor_labels"}
OF_TWO_STAGE = OF_REGIONS | {"features", "dense", "roi_predictions"}
ALL = OF_DENSE | OF_TWO_STAGE | {"tower_1"}


def build(name: str, **overrides: Any) -> nn.Module:
    """A detector in training mode; its BatchNorm takes the statistics of the batch."""
    torch.manual_seed(0)
    return build_model(detector_config(name, **overrides)).train()


def build_teacher(name: str, **overrides: Any) -> nn.Module:
    """A frozen detector in eval mode."""
    return build(name, **GROUP_NORM, **overrides).eval().requires_grad_(False)


def masked_batch() -> List[Dict[str, Any]]:
    """A batch whose boxes have masks as well: Mask R-CNN wants them, the others do not mind."""
    inputs = batch()
    for x in inputs:
        x["instances"].gt_masks = BitMasks(torch.ones(len(x["instances"]), 64, 64))
    return inputs


def c4_detector() -> nn.Module:
    return build(
        "faster_rcnn",
        MODEL__ROI_HEADS__NAME="Res5ROIHeads",
        MODEL__BACKBONE__NAME="build_resnet_backbone",
        MODEL__RESNETS__OUT_FEATURES=["res4"],
        MODEL__RPN__IN_FEATURES=["res4"],
        MODEL__ROI_HEADS__IN_FEATURES=["res4"],
        MODEL__ANCHOR_GENERATOR__SIZES=[[16, 32]],
    )


def record(
    detector: nn.Module, inputs: List[Dict[str, Any]], requires: FrozenSet[str] = ALL
) -> DetectorView:
    """A student's view, filled by its own forward."""
    view = find_view(detector, "student")(detector, inputs)
    with view.record(requires & view.provides):
        detector(inputs)
    return view


def view_of_teacher(detector: nn.Module, inputs: List[Dict[str, Any]]) -> DetectorView:
    return find_view(detector, "teacher")(detector, inputs)


def some_boxes() -> List[Boxes]:
    """Boxes of two images, 3 and 2."""
    boxes = Boxes(torch.tensor([[2.0, 3.0, 2.0 + s, 3.0 + s * 0.8] for s in (6, 20, 60)]))
    return [boxes, Boxes(boxes.tensor[:2] + 1)]
