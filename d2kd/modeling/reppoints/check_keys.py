"""MODEL.REPPOINTS, checked before it builds anything."""

from typing import Mapping

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from ...utils.checks import check_range, check_weight

# Key -> its smallest and largest value
RANGES = {
    "NUM_CLASSES": (1, 10**6),
    "NUM_CONVS": (0, 100),
    "PRIOR_PROB": (1e-6, 1 - 1e-6),
    "POINT_SCALE": (1e-3, 10**4),
    "FOCAL_LOSS_ALPHA": (0, 1),
    "SCORE_THRESH_TEST": (0, 1),
    "TOPK_CANDIDATES_TEST": (1, 10**6),
    "NMS_THRESH_TEST": (0, 1),
}
WEIGHTS = (
    "FOCAL_LOSS_GAMMA",
    "SMOOTH_L1_LOSS_BETA",
    "INIT_LOSS_WEIGHT",
    "REFINE_LOSS_WEIGHT",
)


def check_keys(node: CfgNode, shapes: Mapping[str, ShapeSpec]) -> None:
    """
    Args:
        node: MODEL.REPPOINTS
        shapes: of the backbone, by level

    Raises:
        ValueError: naming the key, its value and what would be right
    """
    for key, (low, high) in RANGES.items():
        check_range(f"MODEL.REPPOINTS.{key}", node[key], low, high)
    for key in WEIGHTS:
        check_weight(f"MODEL.REPPOINTS.{key}", node[key])
    levels = list(node.IN_FEATURES)
    if not levels or any(x not in shapes for x in levels):
        raise ValueError(
            f"MODEL.REPPOINTS.IN_FEATURES must name levels of the backbone, {', '.join(shapes)}, "
            f"got {levels}."
        )
    strides = [shapes[x].stride for x in levels]
    if any(b != 2 * a for a, b in zip(strides, strides[1:])):
        raise ValueError(
            f"MODEL.REPPOINTS.IN_FEATURES is {levels}, with strides {strides}: each must be twice "
            "the one before, so that a box of any size has a level."
        )
