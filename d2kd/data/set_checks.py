"""What a data set's summary means for the part that it plays in a run."""

import logging
from typing import List

from detectron2.config import CfgNode

from .coco_json import CocoSummary

logger = logging.getLogger(__name__)

COCO_KEYPOINTS = 17


def check_role(summary: CocoSummary, part: str, cfg: CfgNode, blame: str) -> None:
    """
    Args:
        part: "TRAIN" or "TEST"
        blame: who is wrong, for errors and warnings

    Raises:
        ValueError: it cannot be trained or evaluated on
    """
    facts = summary.facts
    for note in facts.notes:
        logger.warning(f"{blame}: {note}.")
    if part == "TEST" and not facts.objects:
        raise ValueError(
            f'{blame} has no object in "annotations": there would be no AP. Give it some, or leave '
            "the set out of DATASETS.TEST."
        )
    if cfg.MODEL.MASK_ON:
        _check_masks(summary, part, cfg.INPUT.MASK_FORMAT, blame)
    if cfg.MODEL.KEYPOINT_ON:
        _check_keypoints(summary, part, cfg, blame)
    if part == "TRAIN":
        _tell(
            blame,
            facts.broken,
            facts.count,
            "no polygon of three points or more in the segmentation: Detectron2 leaves such "
            "objects out of training, also their boxes. Without a segmentation they stay",
        )
    else:
        _tell(
            blame,
            facts.odd_area,
            facts.count,
            "an area that is 0 or larger than the box, by which evaluation tells small, medium and "
            "large objects. Where it is left out, it is that of the mask or box",
        )


def _tell(blame: str, ids: List[int], count: int, what: str) -> None:
    """
    Warn of what is so of some annotations.

    Raises:
        ValueError: it is so of more than half
    """
    if ids:
        text = f"{blame}: {len(ids)} of {count} annotations, such as {ids[0]}, have {what}."
        if len(ids) > count / 2:
            raise ValueError(text)
        logger.warning(text)


def _check_masks(summary: CocoSummary, part: str, mask_format: str, blame: str) -> None:
    facts = summary.facts
    without = facts.object_without_mask if part == "TRAIN" else facts.no_mask
    if without is None and part == "TEST" and facts.broken:
        without = facts.broken[0]
    what = "learns" if part == "TRAIN" else "is evaluated on"
    if without is not None:
        raise ValueError(
            f"{blame}: annotation {without} has no segmentation, but with MODEL.MASK_ON True the "
            f"detector {what} masks. Set it to False, or give all annotations one."
        )
    if facts.other_size is not None:
        raise ValueError(
            f"{blame}: annotation {facts.other_size} has an RLE whose size [height, width] is not "
            "that of its image."
        )
    if part == "TRAIN" and mask_format == "polygon" and facts.object_with_rle is not None:
        raise ValueError(
            f"{blame}: annotation {facts.object_with_rle} has its mask as RLE, but "
            "INPUT.MASK_FORMAT is 'polygon'. Set it to 'bitmask'."
        )


def _check_keypoints(summary: CocoSummary, part: str, cfg: CfgNode, blame: str) -> None:
    count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    for length, number in summary.facts.keypoints.items():
        # Detectron2 trains on images whose objects have none without them.
        if length != 3 * count and (length or part == "TEST"):
            raise ValueError(
                f"{blame}: annotation {number} has {length} numbers in its keypoints; with "
                f"MODEL.KEYPOINT_ON True and MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS {count} each "
                f"has {3 * count}, [x, y, visibility, ...]."
            )
    sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or COCO_KEYPOINTS
    if part == "TEST" and sigmas != count:
        raise ValueError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} values, but the detector {count} keypoints "
            "(MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS). Give each its own; empty are COCO's 17."
        )
