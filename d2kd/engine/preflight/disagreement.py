"""Where a teacher and the labels disagree, by class and by image."""

import logging
import math
import os
from typing import Any, Dict, List, Sequence

from pycocotools.coco import COCO
from tabulate import tabulate

from ...labelling.matches import match
from ...labelling.sheet import write_worst
from ...labelling.thresholds import Gate, choose_gate
from ...utils.silent import silent

logger = logging.getLogger(__name__)

MOST_IMAGES = 12  # in the picture
MOST_CLASSES = 20  # in the table
ALIGNED = ["left", *["right"] * 4]
HEADERS = ["class", "objects", "from score", "missed", "false alarms"]


def tell_disagreement(
    truth: COCO,
    images: Sequence[Dict[str, Any]],
    detections: Sequence[Dict[str, Any]],
    categories: Sequence[int],
    path: str,
) -> List[List[Any]]:
    """
    Log a table by class, and write the images with most errors as PATH.json and PATH.png.

    Of each class, those detections count whose score is at least the one with the best F1.

    Args:
        truth: completed, of these and perhaps of more images
        images: in Detectron2's format
        detections: COCO annotations with a score, on these images
        categories: ids of the classes that are compared
        path: without extension

    Returns:
        the rows of the table, without the last, which is their sum
    """
    matches = match(_of_images(truth, {x["image_id"] for x in images}, categories), detections)
    gates = [choose_gate(x, matches[x["id"]]) for x in truth.loadCats(sorted(categories))]
    gates = [x for x in gates if x.matches.truth or x.passed]
    # Where nothing is detected, no score passes and all is missed.
    gates = [x._replace(threshold=math.inf) if x.threshold is None else x for x in gates]
    rows = sorted(map(_row, gates), key=lambda x: -x[3] - x[4])
    total = ["all", *(sum(x[i] for x in rows) if i != 2 else "" for i in range(1, 5))]
    more = len(rows) - MOST_CLASSES
    shown = rows[:MOST_CLASSES] + ([[f"{more} more classes", *[""] * 4]] if more > 0 else [])
    table = tabulate([*shown, total], HEADERS, disable_numparse=True, colalign=ALIGNED)
    logger.info(f"Teacher and labels, at an IoU of 0.5:\n{table}")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if write_worst(gates, images, MOST_IMAGES, path):
        logger.info(
            f"Where they disagree most: {path}.png and .json. Is the teacher wrong there, or are "
            "the labels?"
        )
    return rows


def _of_images(truth: COCO, ids: Any, categories: Sequence[int]) -> COCO:
    part = COCO()
    dataset = truth.dataset
    part.dataset = {
        "images": [x for x in dataset["images"] if x["id"] in ids],
        "categories": [x for x in dataset["categories"] if x["id"] in categories],
        "annotations": [
            x
            for x in dataset["annotations"]
            if x["image_id"] in ids and x["category_id"] in categories
        ],
    }
    with silent():
        part.createIndex()
    return part


def _row(gate: Gate) -> List[Any]:
    errors = len(gate.misses), len(gate.false_alarms)
    score = "-" if math.isinf(gate.threshold) else f"{gate.threshold:.2f}"
    return [gate.name, len(gate.matches.truth), score, *errors]
