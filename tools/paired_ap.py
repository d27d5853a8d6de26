"""AP for samples of the images: how much a gain depends on which images there are."""

import json
from typing import Any, Dict, List, Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


class ImageAP:
    """COCO's AP for any choice of images; which detection fits which object is found once."""

    def __init__(self, truth: COCO, detections: List[Dict[str, Any]], task: str = "bbox"):
        """
        Args:
            truth: ground truth
            detections: as in Detectron2's coco_instances_results.json; may be empty
            task: "bbox" or "segm"
        """
        # Without detections loadRes fails; nothing is found then, and every AP is 0.
        self.evaluation = COCOeval(truth, truth.loadRes(detections) if detections else COCO(), task)
        params = self.evaluation.params
        params.imgIds = sorted(truth.getImgIds())
        params.catIds = sorted(truth.getCatIds())
        params.areaRng, params.areaRngLbl = params.areaRng[:1], ["all"]
        params.maxDets = params.maxDets[-1:]
        self.empty = not detections
        self.num_images = len(params.imgIds)
        if not self.empty:
            self.evaluation.evaluate()
            found = np.array(self.evaluation.evalImgs, dtype=object)
            self.found = found.reshape(len(params.catIds), -1)

    def __call__(self, images: Sequence[int]) -> float:
        """
        Args:
            images: indices, some perhaps several times

        Returns:
            AP in percent; NaN if no image has an object
        """
        if self.empty:
            return 0.0
        self.evaluation.evalImgs = list(self.found[:, images].ravel())
        # Each drawn image counts as one of its own.
        ids = list(range(len(images)))
        self.evaluation.params.imgIds = self.evaluation._paramsEval.imgIds = ids
        self.evaluation.accumulate()
        precision = self.evaluation.eval["precision"]
        precision = precision[precision > -1]
        return 100 * float(precision.mean()) if len(precision) else float("nan")


def image_error(alone: Sequence[ImageAP], distilled: Sequence[ImageAP], samples: int) -> float:
    """
    How much the gain in AP, a mean over seeds, depends on which images there are.

    Args:
        alone, distilled: one of each seed, on the same images
        samples: how often to draw as many images as there are, with replacement; the same ones for
            all runs

    Returns:
        standard deviation of the gain over the samples
    """
    count, random, gains = alone[0].num_images, np.random.default_rng(0), []
    for _ in range(samples):
        images = random.integers(count, size=count)
        pairs = zip(distilled, alone)
        gains.append(np.mean([ours(images) - theirs(images) for ours, theirs in pairs]))
    return float(np.nanstd(gains, ddof=1))


def read_detections(path: str) -> List[Dict[str, Any]]:
    with open(path) as file:
        return json.load(file)
