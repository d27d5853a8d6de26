"""The two towers of convolutions inside a dense head, one for classes and one for boxes."""

from dataclasses import dataclass
from typing import Any, List, Optional, Sequence, Tuple

from torch import Tensor, nn


@dataclass
class Towers:
    """
    The output of one convolution of each tower, after its norm and before its activation: per
    level (N, C, Hi, Wi).
    """

    classes: List[Tensor]
    boxes: List[Tensor]


def depth_of(head: nn.Module) -> int:
    """Convolutions in each tower of a RetinaNetHead or FCOSHead; 0 of a head without towers."""
    return len(_activations(head.cls_subnet)) if hasattr(head, "cls_subnet") else 0


def hook_towers(head: nn.Module, depth: int, towers: Towers) -> List[Any]:
    """
    Collect, level by level, the output of convolution number `depth` of each tower.

    Args:
        depth: from 1 to depth_of(head)

    Returns:
        handles to remove the hooks with
    """

    def collect(into: List[Tensor]) -> Any:
        return lambda module, inputs: into.append(inputs[0])

    return [
        subnet[_activations(subnet)[depth - 1]].register_forward_pre_hook(collect(into))
        for subnet, into in ((head.cls_subnet, towers.classes), (head.bbox_subnet, towers.boxes))
    ]


def predict_from(
    head: nn.Module, depth: int, towers: Towers
) -> Tuple[List[Tensor], List[Tensor], Optional[List[Tensor]]]:
    """
    Run the rest of a head on given towers: its activation number `depth`, the convolutions after
    it, and the predictors.

    Returns:
        logits, deltas, centerness (None without), as in DensePredictions
    """
    classes = rest_of_tower(head.cls_subnet, depth, towers.classes)
    boxes = rest_of_tower(head.bbox_subnet, depth, towers.boxes)
    centerness = [head.ctrness(x) for x in boxes] if hasattr(head, "ctrness") else None
    return [head.cls_score(x) for x in classes], [head.bbox_pred(x) for x in boxes], centerness


def rest_of_tower(subnet: nn.Sequential, depth: int, levels: Sequence[Tensor]) -> List[Tensor]:
    """Run what comes after convolution number `depth` of a tower, its activation first."""
    rest = subnet[_activations(subnet)[depth - 1] :]
    return [rest(x) for x in levels]


def _activations(subnet: nn.Sequential) -> List[int]:
    return [i for i, module in enumerate(subnet) if isinstance(module, nn.ReLU)]
