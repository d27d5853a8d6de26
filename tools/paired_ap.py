"""AP for samples of the images: how much a gain depends on which images there are."""

import json
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

SAMPLES = 200  # of the bootstrap


class ImageAP:
    """
    COCO's AP for any choice of images. Which detection fits which object is found once, and how
    often an image is drawn is a weight: with COCOeval's own sums a sample takes much longer.
    """

    def __init__(self, truth: COCO, detections: List[Dict[str, Any]], task: str = "bbox"):
        """
        Args:
            truth: ground truth
            detections: as in Detectron2's coco_instances_results.json; may be empty
            task: "bbox" or "segm"
        """
        # Without detections loadRes fails; nothing is found then, and every AP is 0.
        evaluation = COCOeval(truth, truth.loadRes(detections) if detections else COCO(), task)
        params = evaluation.params
        params.imgIds = sorted(truth.getImgIds())
        params.catIds = sorted(truth.getCatIds())
        params.areaRng, params.areaRngLbl = params.areaRng[:1], ["all"]
        params.maxDets = params.maxDets[-1:]
        self.empty = not detections
        self.num_images = len(params.imgIds)
        self.recalls = params.recThrs
        self.classes: List[_Class] = []
        if not self.empty:
            evaluation.evaluate()
            per_image = evaluation.evalImgs  # a class after the other, the images of each in order
            for start in range(0, len(per_image), self.num_images):
                self.classes.append(_class_of(per_image[start : start + self.num_images]))

    def __call__(self, images: Sequence[int]) -> float:
        """
        Args:
            images: indices, some perhaps several times

        Returns:
            AP in percent; NaN if no image has an object
        """
        if self.empty:
            return 0.0
        weights = np.bincount(images, minlength=self.num_images).astype(float)
        found = [_precision(x, weights, self.recalls) for x in self.classes]
        precisions = [x for x in found if x is not None]
        return 100 * float(np.mean(precisions)) if precisions else float("nan")

    def samples(self, count: int = SAMPLES) -> np.ndarray:
        """
        AP for bootstrap samples: as many images as there are, drawn with replacement, the same ones
        for all runs.

        Returns:
            [count]
        """
        random, images = np.random.default_rng(0), self.num_images
        return np.array([self(random.integers(images, size=images)) for _ in range(count)])


class _Class(NamedTuple):
    """
    Detections of a class, D in all images, by falling score; T thresholds of IoU.

    image: [D] index; true, false: [T, D], neither where an ignored object is hit; objects: [images]
    """

    image: np.ndarray
    true: np.ndarray
    false: np.ndarray
    objects: np.ndarray


def _class_of(per_image: Sequence[Optional[Dict[str, Any]]]) -> _Class:
    """
    Args:
        per_image: of COCOeval; None: neither an object nor a detection
    """
    objects = np.zeros(len(per_image))
    parts = []
    for i, x in enumerate(per_image):
        if x is not None:
            objects[i] = np.count_nonzero(np.equal(x["gtIgnore"], 0))
            parts.append((np.full(len(x["dtScores"]), i), x))
    if not parts:
        none = np.zeros((1, 0), dtype=bool)
        return _Class(np.zeros(0, dtype=int), none, none, objects)
    scores = np.concatenate([x["dtScores"] for _, x in parts])
    order = np.argsort(-scores, kind="mergesort")  # as COCOeval, of equal scores the first
    hit = np.concatenate([x["dtMatches"] for _, x in parts], axis=1)[:, order] != 0
    counts = ~np.concatenate([x["dtIgnore"] for _, x in parts], axis=1)[:, order].astype(bool)
    image = np.concatenate([index for index, _ in parts])[order]
    return _Class(image, hit & counts, ~hit & counts, objects)


def _precision(found: _Class, weights: np.ndarray, recalls: np.ndarray) -> Optional[np.ndarray]:
    """
    Args:
        weights: [images] how often each counts
        recalls: [R] at which to read the precision

    Returns:
        [T, R]; None where the class has no object
    """
    objects = found.objects @ weights
    if not objects:
        return None
    weight = weights[found.image]
    true = np.cumsum(found.true * weight, axis=1)
    false = np.cumsum(found.false * weight, axis=1)
    precision = true / np.maximum(true + false, 1)
    # At each recall the best of what is to come, and 0 behind the last.
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision = np.pad(precision, ((0, 0), (0, 1)))
    places = [np.searchsorted(x / objects, recalls, side="left") for x in true]
    return np.stack([x[place] for x, place in zip(precision, places)])


def image_error(alone: Sequence[np.ndarray], distilled: Sequence[np.ndarray]) -> float:
    """
    How much the gain in AP, a mean over seeds, depends on which images there are.

    Args:
        alone, distilled: AP of each seed for the same samples of the images

    Returns:
        standard deviation of the gain over the samples
    """
    return float(np.nanstd(np.mean(distilled, axis=0) - np.mean(alone, axis=0), ddof=1))


def read_detections(path: str) -> List[Dict[str, Any]]:
    with open(path) as file:
        return json.load(file)
