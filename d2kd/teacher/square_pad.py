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
    for part in ("TRAIN", "TEST") if side else ():
        shorter, key = cfg.INPUT[f"MIN_SIZE_{part}"], f"MAX_SIZE_{part}"
        if 0 in (shorter if isinstance(shorter, (list, tuple)) else [shorter]):
            raise ValueError(
                f"INPUT.MIN_SIZE_{part} is {shorter}: images stay as large as they are, whatever "
                f"INPUT.{key} is, but the teacher pads every image to {side} x {side} pixels and "
                "would lose what is beyond. Set it to the shorter side that images shall have."
            )
        if cfg.INPUT[key] > side:
            raise ValueError(
                f"INPUT.{key} is {cfg.INPUT[key]}, but the teacher pads every image to {side} x "
                f"{side} pixels and would lose what is beyond. Set INPUT.MAX_SIZE_TRAIN and "
                f"INPUT.MAX_SIZE_TEST to {side} or less."
            )
