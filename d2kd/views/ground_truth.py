"""Ground truth of a batch on the device where it is read."""

from typing import Any, Dict, List, Sequence

import torch
from torch import Tensor

from detectron2.structures import BitMasks, Boxes, Instances, Keypoints

from ..utils.to_device import to_device


def ground_truth(batched_inputs: Sequence[Dict[str, Any]], device: torch.device) -> List[Instances]:
    """
    The "instances" of each image on a device. Unlike Instances.to this does not wait until a GPU
    has done all its queued work.
    """
    if any("instances" not in x for x in batched_inputs):
        raise ValueError(
            "An image without labels has no boxes. A head that reads gt_instances must have it in "
            "its `requires`; then DISTILL.UNLABELLED.BOX_SCORE lets the teacher's detections stand "
            "in."
        )
    return [_moved(x["instances"], device) for x in batched_inputs]


def _moved(instances: Instances, device: torch.device) -> Instances:
    moved = Instances(instances.image_size)
    for name, value in instances.get_fields().items():
        if isinstance(value, Boxes):  # Boxes.to has no such argument
            value = type(value)(to_device(value.tensor, device))
        elif isinstance(value, (Tensor, BitMasks, Keypoints)):
            value = to_device(value, device)
        elif hasattr(value, "to"):
            value = value.to(device)
        moved.set(name, value)
    return moved
