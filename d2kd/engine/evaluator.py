import os
from typing import Any, Dict, Optional

import pycocotools.mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    coco_evaluation,
)

from ..data.annotations import is_polygon
from ..data.checks import check_evaluator
from ..data.coco_parts import whole_size
from ..utils.silent import silent


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None
) -> DatasetEvaluator:
    """
    Detectron2's evaluator for the data set's type.

    Args:
        output_folder: None: "inference" in OUTPUT_DIR, with several test sets one folder for each
            below it

    Raises:
        ValueError: a type without boxes to evaluate
    """
    of_several = dataset_name if len(cfg.DATASETS.TEST) > 1 else ""
    output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", of_several)
    metadata = MetadataCatalog.get(dataset_name)
    check_evaluator(metadata)
    if metadata.evaluator_type == "lvis":
        return LVISEvaluator(dataset_name, output_dir=output_folder)
    if metadata.evaluator_type == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
    return CompleteCOCOEvaluator(dataset_name, output_dir=output_folder, kpt_oks_sigmas=sigmas)


def best_metric(cfg: CfgNode) -> str:
    """TEST.BEST_METRIC as the results are named; with several test sets that of the first."""
    metric, sets = cfg.TEST.BEST_METRIC, cfg.DATASETS.TEST
    if len(sets) == 1:  # whose name is not in the results
        return metric.removeprefix(f"{sets[0]}/")
    if not sets or metric.startswith(tuple(f"{x}/" for x in sets)):
        return metric
    return f"{sets[0]}/{metric}"


class CompleteCOCOEvaluator(COCOEvaluator):
    """
    Detectron2's COCOEvaluator, on ground truth that :func:`complete_truth` has completed for
    pycocotools.
    """

    def __init__(self, dataset_name: str, **kwargs: Any):
        """
        Args:
            kwargs: of :class:`COCOEvaluator`
        """
        # Detectron2's faster one is compiled, and not installed everywhere; the numbers are equal.
        fast = coco_evaluation.COCOeval_opt is not COCOeval
        super().__init__(dataset_name, use_fast_impl=fast, **kwargs)
        complete_truth(self._coco_api)


def complete_truth(truth: COCO) -> None:
    """
    Fill in, in place, missing fields that can have only one value: "iscrowd" 0; the area of the
    mask, or else of the box; the number of visible keypoints; an empty "info". Annotation ids count
    from 1, as pycocotools takes a match with the id 0 for none, and sizes of images become
    integers, as it draws no polygon at 640.0. Polygons of fewer than three points, which Detectron2
    leaves out of training, are left out.
    """
    content = truth.dataset
    content.setdefault("info", {})
    for image in content["images"]:
        image.update(whole_size(image))
    numbers: Dict[Any, int] = {}
    for annotation in content.get("annotations", ()):
        annotation.setdefault("iscrowd", 0)
        if annotation.get("keypoints"):
            visible = sum(x > 0 for x in annotation["keypoints"][2::3])
            annotation.setdefault("num_keypoints", visible)
        polygons = annotation.get("segmentation")
        if isinstance(polygons, list):  # pycocotools would fail on others, or take them for boxes
            annotation["segmentation"] = [x for x in polygons if is_polygon(x)]
        if annotation.get("area") is None:
            annotation["area"] = _area(truth, annotation)
        # Where Detectron2's own sets have an id twice, pycocotools keeps one annotation of it.
        annotation["id"] = numbers.setdefault(annotation["id"], len(numbers) + 1)
    with silent():
        truth.createIndex()


def _area(truth: COCO, annotation: Dict[str, Any]) -> float:
    """Area of the mask, or of the box where there is no mask, in square pixels."""
    if annotation.get("segmentation"):
        return float(pycocotools.mask.area(truth.annToRLE(annotation)))
    return float(annotation["bbox"][2] * annotation["bbox"][3])
