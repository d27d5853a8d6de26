"""Which cells the objects of a batch mark: those of their boxes, or those of their masks."""

from typing import List, Sequence, Tuple

import torch
from torch import Tensor

from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Instances, PolygonMasks

from ..layers import touched_cells

OBJECTS = ("boxes", "masks")


def check_masks_are_read(key: str, objects: str, cfg: CfgNode) -> None:
    """
    Args:
        key: of `objects`, for the error

    Raises:
        ValueError: masks are wanted, but the data is loaded without them
    """
    if objects == "masks" and not cfg.MODEL.MASK_ON:
        raise ValueError(
            f"{key} is 'masks', but labels are loaded without masks: set MODEL.MASK_ON True, for a "
            "dense student too, and, where they are RLE, INPUT.MASK_FORMAT 'bitmask'."
        )


def object_cells(
    instances: Sequence[Instances], strides: Sequence[int], sizes: Sequence[Tuple[int, int]]
) -> List[Tensor]:
    """
    The cells in which an object of a batch has a pixel: of its mask, or of its box where it has no
    mask, as a teacher's detection that stands in for a label.

    Args:
        instances: ground truth of each image, M objects in all
        strides: of the levels, pixels per cell
        sizes: height and width of their maps

    Returns:
        of each level boolean (M, H, W), object by object, image by image
    """
    height, width = (max(s * size[i] for s, size in zip(strides, sizes)) for i in (0, 1))
    counts, device = [len(x) for x in instances], instances[0].gt_boxes.device
    masks = torch.zeros(sum(counts), height, width, dtype=torch.bool, device=device)
    for x, part in zip(instances, masks.split(counts)):
        own = _masks(x)[:, :height, :width]
        part[:, : own.shape[1], : own.shape[2]] = own
    return touched_cells(masks, strides, sizes)


def _masks(instances: Instances) -> Tensor:
    """Boolean (M, height, width) of an image without its padding."""
    boxes = instances.gt_boxes.tensor
    if not len(boxes) or not instances.has("gt_masks"):
        return _filled(boxes, instances.image_size)
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
        masks = masks.to(boxes.device, non_blocking=True)
    return masks.tensor


def _filled(boxes: Tensor, size: Tuple[int, int]) -> Tensor:
    """The pixels whose centre lies in each box."""
    inside = []
    for axis, length in ((1, size[0]), (0, size[1])):
        centres = torch.arange(length, device=boxes.device) + 0.5
        inside.append((centres >= boxes[:, axis, None]) & (centres < boxes[:, axis + 2, None]))
    rows, columns = inside
    return rows[:, :, None] & columns[:, None, :]
