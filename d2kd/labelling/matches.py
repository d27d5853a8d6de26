"""Match detections with the ground truth, as COCO's evaluation does."""

from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..utils.silent import silent

IOU = 0.5
ALL_AREAS = [0, 1e10]  # square pixels


class ClassMatches(NamedTuple):
    """
    The D detections, by falling score, and the T ground-truth boxes of one class. Crowds and the
    detections on them are left out.

    `hits`: (D,) bool, whether a detection matches a box; `found_with`: (T,) score of the detection
    that matches a box, -inf where none does.
    """

    detections: List[Dict[str, Any]]
    hits: np.ndarray
    truth: List[Dict[str, Any]]
    found_with: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        """(D,)"""
        return np.array([x["score"] for x in self.detections], dtype=np.float64)

    def misses(self, threshold: float) -> List[Dict[str, Any]]:
        """Boxes that no detection of this score matches."""
        return [x for x, score in zip(self.truth, self.found_with) if score < threshold]

    def false_alarms(self, threshold: float) -> List[Dict[str, Any]]:
        """Detections of this score that match no box."""
        pairs = zip(self.detections, self.hits)
        return [x for x, hit in pairs if x["score"] >= threshold and not hit]


def match(truth: COCO, detections: Sequence[Dict[str, Any]]) -> Dict[int, ClassMatches]:
    """
    In each image, each detection of a class in the order of falling score takes the box with which
    it overlaps most, at an IoU of 0.5 or more, among those that none before it took. So the matches
    of high scores do not depend on whether lower ones are there.

    Args:
        truth: completed by :func:`complete_truth`
        detections: COCO annotations with a score, also with other keys

    Returns:
        category id to its matches, for all categories
    """
    found = COCO()
    found.dataset = {
        "images": truth.dataset["images"],
        "categories": truth.dataset["categories"],
        # Ids from 1, because pycocotools takes a match with the id 0 for none.
        "annotations": [{**x, "id": i} for i, x in enumerate(detections, 1)],
    }
    with silent():
        found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.iouThrs = np.array([IOU])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [ALL_AREAS], ["all"]
        evaluation.params.maxDets = [max(len(detections), 1)]
        evaluation.evaluate()
    by_category: Dict[int, List[Dict[str, Any]]] = {x: [] for x in sorted(truth.getCatIds())}
    for image in filter(None, evaluation.evalImgs):  # None: neither boxes nor detections
        by_category[image["category_id"]].append(image)
    return {x: _of_class(images, truth, found) for x, images in by_category.items()}


def _of_class(images: List[Dict[str, Any]], truth: COCO, found: COCO) -> ClassMatches:
    """
    Args:
        images: COCOeval's results of one class
    """
    detections: List[Tuple[Dict[str, Any], bool]] = []
    boxes: List[Tuple[Dict[str, Any], float]] = []
    for image in images:
        for number, other, ignored in zip(
            image["dtIds"], image["dtMatches"][0], image["dtIgnore"][0]
        ):
            if not ignored:
                detections.append((found.anns[number], other > 0))
        for number, other, ignored in zip(image["gtIds"], image["gtMatches"][0], image["gtIgnore"]):
            if not ignored:
                score = found.anns[int(other)]["score"] if other > 0 else -np.inf
                boxes.append((truth.anns[number], score))
    detections.sort(key=lambda x: -x[0]["score"])
    return ClassMatches(
        [x for x, _ in detections],
        np.array([hit for _, hit in detections], dtype=bool),
        [x for x, _ in boxes],
        np.array([score for _, score in boxes], dtype=np.float64),
    )
