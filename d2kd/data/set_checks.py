"""Check a data set's summary for its use in a run: training or evaluation."""

import importlib.util
import logging
from typing import List

from detectron2.config import CfgNode

from .coco_json import CocoSummary

logger = logging.getLogger(__name__)

COCO_KEYPOINTS = 17
# Without regions, and so without masks; from masks of labels they may learn, by heads with OBJECTS.
DENSE_DETECTORS = ("RetinaNet", "FCOS", "RepPoints")


def check_role(
    summary: CocoSummary, part: str, cfg: CfgNode, meta_architecture: str, blame: str
) -> None:
    """
    Args:
        part: "TRAIN" or "TEST"
        meta_architecture: of the detector that is trained or evaluated
        blame: the config key and file, for errors and warnings

    Raises:
        ValueError: the set cannot be trained or evaluated on
    """
    facts = summary.facts
    for note in facts.notes:
        logger.warning(f"{blame}: {note}.")
    _check_resized(summary, part, cfg, blame)
    if part == "TEST" and not facts.objects:
        raise ValueError(
            f'{blame} has no object in "annotations", so that AP is undefined. Annotate it, or '
            "remove the set from DATASETS.TEST. (Those with iscrowd 1 are no objects.)"
        )
    if cfg.MODEL.MASK_ON and (part == "TRAIN" or meta_architecture not in DENSE_DETECTORS):
        _check_masks(summary, part, cfg.INPUT.MASK_FORMAT, blame)
        _check_crop(summary, part, cfg, blame)
    if cfg.MODEL.KEYPOINT_ON:
        _check_keypoints(summary, part, cfg, blame)
    if part == "TRAIN":
        _report(
            blame,
            facts.broken,
            facts.count,
            "no polygon of three points or more in the segmentation: Detectron2 does not train on "
            "such objects, not even on their boxes. Without a segmentation it does",
        )
    else:
        _report(
            blame,
            facts.odd_area,
            facts.count,
            "an area that is 0 or larger than the box; evaluation uses it to separate small, "
            "medium and large objects. If left out, it is computed from the mask or box",
        )


def _check_resized(summary: CocoSummary, part: str, cfg: CfgNode, blame: str) -> None:
    """Detectron2 would find out when it reads the image, of a test set after the training."""
    key = f"MAX_SIZE_{part}"
    if cfg.INPUT[f"MIN_SIZE_{part}"] in (0, (0,)):  # images stay as they are
        return
    for name, width, height in summary.images:
        if min(width, height) * cfg.INPUT[key] / max(width, height) < 0.5:
            raise ValueError(
                f"{blame}: INPUT.{key} {cfg.INPUT[key]} would make the image {name} of "
                f"{width}x{height} pixels (width x height) less than a pixel wide or high. Set a "
                "larger one, or leave the image out."
            )


def _report(blame: str, ids: List[int], count: int, what: str) -> None:
    """
    Warn of annotations that have the problem `what`.

    Raises:
        ValueError: more than half of them have it
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
            f"detector {what} masks. Set it to False, or add a segmentation to all annotations."
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


def _check_crop(summary: CocoSummary, part: str, cfg: CfgNode, blame: str) -> None:
    number = summary.facts.object_with_polygon
    if part == "TEST" or not cfg.INPUT.CROP.ENABLED or number is None:
        return
    if importlib.util.find_spec("shapely") is None:
        raise ValueError(
            f"{blame}: annotation {number} has its mask as polygons, which Detectron2 crops "
            "(INPUT.CROP.ENABLED True) by the package shapely, which is not installed: pip install "
            "shapely. Masks as RLE do not need it."
        )


def _check_keypoints(summary: CocoSummary, part: str, cfg: CfgNode, blame: str) -> None:
    count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    for length, number in summary.facts.keypoints.items():
        # In training Detectron2 accepts objects without keypoints.
        if length != 3 * count and (length or part == "TEST"):
            raise ValueError(
                f"{blame}: annotation {number} has {length} numbers in its keypoints; with "
                f"MODEL.KEYPOINT_ON True and MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS {count} each "
                f"has {3 * count}, [x, y, visibility, ...]."
            )
    sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or COCO_KEYPOINTS
    if part == "TEST" and sigmas != count:
        raise ValueError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} values, but the detector has {count} keypoints "
            "(MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS). Give one value each; [] means COCO's 17."
        )
