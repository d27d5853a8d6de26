"""AP for samples of the images: how much a gain depends on which images there are."""

import json
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


class ImageAP:
    """COCO's box AP for any choice of images; which detection fits which object is found once."""

    def __init__(self, truth: COCO, detections: List[Dict[str, Any]]):
        """
        Args:
            truth: ground truth
            detections: as in Detectron2's coco_instances_results.json; may be empty
        """
        # Without detections loadRes fails; nothing is found then, and every AP is 0.
        self.evaluation = COCOeval(
            truth, truth.loadRes(detections) if detections else COCO(), "bbox"
        )
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


def gain_interval(
    alone: Sequence[ImageAP], distilled: Sequence[ImageAP], samples: int, seed: int = 0
) -> Tuple[float, float, float]:
    """
    The gain in AP, a mean over seeds, and its bootstrap interval over images.

    Args:
        alone, distilled: one of each seed, on the same images
        samples: how often to draw as many images as there are, with replacement; the same ones for
            all runs

    Returns:
        gain, and the 2.5th and 97.5th percentile of what it is on the samples
    """
    count, random = alone[0].num_images, np.random.default_rng(seed)

    def gain(images: Sequence[int]) -> float:
        pairs = zip(distilled, alone)
        return float(np.mean([ours(images) - theirs(images) for ours, theirs in pairs]))

    drawn = [gain(random.integers(count, size=count)) for _ in range(samples)]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return gain(np.arange(count)), float(low), float(high)


def read_detections(path: str) -> List[Dict[str, Any]]:
    with open(path) as file:
        return json.load(file)
