"""Run a detector on images, and keep its detections as COCO annotations."""

from typing import Any, Dict, List, Mapping, Optional

import torch

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset

from ..data.mapper import CheckedMapper
from ..teacher import Teacher

Annotation = Dict[str, Any]


def detect(
    detector: Teacher,
    images: List[Dict[str, Any]],
    cfg: CfgNode,
    categories: Mapping[int, int],
    thresholds: Optional[Mapping[int, float]] = None,
) -> List[Annotation]:
    """
    Detectron2's own inference, which logs its progress.

    Args:
        images: in Detectron2's format
        cfg: how images are read: INPUT.*_TEST, DATALOADER.NUM_WORKERS
        categories: the detector's class to category id; other classes are left out
        thresholds: category id to the lowest score kept, others are left out; None: keep all

    Returns:
        of all images, with image_id, category_id, bbox (XYWH, inside the image), area, iscrowd and
        score
    """
    mapper = CheckedMapper(cfg, is_train=False, image_format=detector.image_format)
    loader = build_detection_test_loader(
        images, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS
    )
    return inference_on_dataset(detector.model, loader, Collector(categories, thresholds))


class Collector(DatasetEvaluator):
    """Evaluates nothing: its result is the detections."""

    def __init__(
        self, categories: Mapping[int, int], thresholds: Optional[Mapping[int, float]] = None
    ):
        """See :func:`detect`."""
        self.categories = categories
        self.thresholds = thresholds
        self.found: List[Annotation] = []

    def reset(self) -> None:
        self.found = []

    def process(self, inputs: List[Dict[str, Any]], outputs: List[Dict[str, Any]]) -> None:
        for image, output in zip(inputs, outputs):
            if "instances" not in output:
                raise ValueError("MODEL.META_ARCHITECTURE: this model detects no objects.")
            instances = output["instances"].to("cpu")
            for index, score, box in zip(
                instances.pred_classes.tolist(),
                instances.scores.tolist(),
                _clipped(instances.pred_boxes.tensor, image["width"], image["height"]).tolist(),
            ):
                category, score = self.categories.get(index), round(score, 6)
                if category is not None and self._is_kept(category, score) and _has_area(box):
                    self.found.append(_annotation(image["image_id"], category, box, score))

    def evaluate(self) -> List[Annotation]:
        return self.found

    def _is_kept(self, category: int, score: float) -> bool:
        return self.thresholds is None or score >= self.thresholds.get(category, float("inf"))


def _clipped(boxes: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """XYXY, to hundredths of a pixel as in COCO's own files."""
    limits = torch.tensor([width, height, width, height], dtype=torch.float64)
    return (boxes.double().clamp(min=0).minimum(limits) * 100).round() / 100


def _has_area(box: List[float]) -> bool:
    return box[0] < box[2] and box[1] < box[3]


def _annotation(image_id: int, category_id: int, box: List[float], score: float) -> Annotation:
    x, y, width, height = box[0], box[1], round(box[2] - box[0], 2), round(box[3] - box[1], 2)
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x, y, width, height],
        "area": round(width * height, 2),
        "iscrowd": 0,
        "score": score,
    }
