"""The error of a rebuilt map, in the reduction that the published weights of MGD assume."""

from typing import Optional, Sequence, Tuple

from torch import Tensor
from torch.nn import functional as F

from detectron2.config import CfgNode

from ..utils.checks import check_range


def squared_error(rebuilt: Tensor, target: Tensor, inside: Optional[Tensor] = None) -> Tensor:
    """
    Squared error, summed over channels and the cells inside the image, averaged over images.

    Args:
        rebuilt, target: (N, C, H, W); the target gets no gradient
        inside: (N, 1, H, W); None: all cells count

    Returns:
        scalar in float32 also under AMP: a sum over 100,000 cells overflows half precision
    """
    rebuilt, target = rebuilt.float(), target.detach().float()
    if inside is not None:
        rebuilt, target = rebuilt * inside, target * inside
    return F.mse_loss(rebuilt, target, reduction="sum") / len(rebuilt)


def add_reference_config(node: CfgNode) -> None:
    """Write the key that makes a loss weight independent of the size of the input."""
    # The loss is a sum over cells, so its share grows with the image, and a weight is right for one
    # input size. 0: as published, for 800x1344. N > 0: the loss is multiplied by N / pixels of the
    # image, so that LOSS_WEIGHT means at every input size what it means at N pixels; 1075200 is
    # 800x1344 and lets the published weights be typed in at any size.
    node.REFERENCE_PIXELS = 0


def read_reference_pixels(key: str, node: CfgNode) -> int:
    """
    Args:
        key: of `node`, for the error

    Raises:
        ValueError: below 0
    """
    why = "0 is as published; else a number of pixels, such as 1075200 for 800x1344"
    check_range(f"{key}.REFERENCE_PIXELS", node.REFERENCE_PIXELS, 0, 10**9, why)
    return node.REFERENCE_PIXELS


def pixel_factor(reference_pixels: int, image_sizes: Sequence[Tuple[int, int]]) -> float:
    """
    Args:
        reference_pixels: see add_reference_config
        image_sizes: (height, width) of each image, without padding

    Returns:
        what to multiply a sum over cells with
    """
    if not reference_pixels:
        return 1.0
    pixels = sum(height * width for height, width in image_sizes) / len(image_sizes)
    return reference_pixels / pixels
