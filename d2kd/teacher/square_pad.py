"""Teachers that pad every image to one square, as ViTDet does."""

from torch import nn

from detectron2.config import CfgNode


def square_pad(detector: nn.Module) -> int:
    """Side of the square that a detector pads every image to, in pixels; 0: as large as needed."""
    backbone = getattr(detector, "backbone", None)
    return getattr(backbone, "padding_constraints", {}).get("square_size", 0)


def check_images_fit(detector: nn.Module, cfg: CfgNode) -> None:
    """
    Args:
        detector: the teacher
        cfg: of the student, whose images both see

    Raises:
        ValueError: images can be larger than the square; Detectron2 would cut them off
    """
    side = square_pad(detector)
    for key in ("MAX_SIZE_TRAIN", "MAX_SIZE_TEST") if side else ():
        if cfg.INPUT[key] > side:
            raise ValueError(
                f"INPUT.{key} is {cfg.INPUT[key]}, but the teacher pads every image to {side} x "
                f"{side} pixels and would lose what is beyond. Set INPUT.MAX_SIZE_TRAIN and "
                f"INPUT.MAX_SIZE_TEST to {side} or less."
            )
