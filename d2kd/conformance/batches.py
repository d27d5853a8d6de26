"""Noise images with boxes, in Detectron2's training format."""

from typing import Any, Dict, List

import torch

from detectron2.structures import BitMasks, Boxes, Instances

from .detectors import NUM_CLASSES


def batch(
    num_images: int = 2, boxes: int = 2, height: int = 64, width: int = 64, seed: int = 0
) -> List[Dict[str, Any]]:
    """
    Detectron2's training input: noise images with `boxes` boxes each.

    Returns:
        list of {"image": (3, height, width) uint8, "instances", "file_name", "height", "width"}
    """
    generator = torch.Generator().manual_seed(seed)
    inputs: List[Dict[str, Any]] = []
    for i in range(num_images):
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        corner = torch.rand(boxes, 2, generator=generator) * torch.tensor([width, height]) * 0.5
        size = 8 + torch.rand(boxes, 2, generator=generator) * (min(height, width) * 0.5 - 8)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
        instances.gt_classes = torch.randint(0, NUM_CLASSES, (boxes,), generator=generator)
        # For detectors with masks: stripes, of which each box has some.
        instances.gt_masks = BitMasks((torch.arange(width) // 4 % 2 == 1).expand(boxes, height, -1))
        inputs.append(
            {
                "image": image,
                "instances": instances,
                "file_name": f"image_{i}.png",
                "height": height,
                "width": width,
            }
        )
    return inputs
