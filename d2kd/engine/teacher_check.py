"""Before the first step: does the teacher know anything of this data?"""

import logging
import math
from typing import Any, Dict, List

import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm

from ..teacher import Teacher
from ..views import find_view

logger = logging.getLogger(__name__)


def check_teacher(cfg: CfgNode, teacher: Teacher) -> None:
    """
    Evaluate the teacher on a part of the first test set, as it sees images in training: at the
    student's size. A teacher can be whole and still be the wrong one: other classes, channels in
    another order, pixels divided by another deviation.

    Args:
        cfg: of the run, whose data sets are registered

    Raises:
        ValueError: its AP is below DISTILL.TEACHER.MIN_AP
    """
    node = cfg.DISTILL.TEACHER
    if not node.EVAL_IMAGES or not comm.is_main_process():
        return
    reason = _why_not(cfg, teacher)
    # Read before the classes are compared: it tells Detectron2 their names.
    images = [] if reason else _some(DatasetCatalog.get(cfg.DATASETS.TEST[0]), node.EVAL_IMAGES)
    reason = reason or _other_classes(cfg, teacher)
    if reason:
        logger.warning(f"The teacher is not evaluated: {reason}.")
        return
    name = cfg.DATASETS.TEST[0]
    ap = _evaluate(cfg, teacher, name, images)
    logger.info(f"The teacher has {ap:.1f} AP on {len(images)} images of {name}.")
    if not ap >= node.MIN_AP:
        raise ValueError(
            f"DISTILL.TEACHER: on {len(images)} images of {name} it has {ap:.2f} AP, less than "
            f"DISTILL.TEACHER.MIN_AP {node.MIN_AP}. Is it trained for these classes, in this "
            "order? Are MODEL.PIXEL_MEAN, PIXEL_STD and INPUT.FORMAT in its config those that it "
            "was trained with? (EVAL_IMAGES 0 does not ask.)"
        )


def _why_not(cfg: CfgNode, teacher: Teacher) -> str:
    """A reason why the teacher cannot be evaluated; "" if it can."""
    if not teacher.manifest["weights_sha256"]:
        return "its weights are random"
    if not cfg.DATASETS.TEST:
        return "DATASETS.TEST is empty"
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    if metadata.evaluator_type != "coco":
        return f"{metadata.name} is not in COCO's format"
    return ""


def _other_classes(cfg: CfgNode, teacher: Teacher) -> str:
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    classes = find_view(teacher.model, "teacher").num_classes(teacher.model)
    if classes != len(metadata.thing_classes):
        return f"it has {classes} classes, {metadata.name} {len(metadata.thing_classes)}"
    return ""


def _some(images: List[Dict[str, Any]], count: int) -> List[Dict[str, Any]]:
    """At most `count` of them, at equal distances: sets are often sorted."""
    step = max(len(images) / count, 1)
    return [images[int(i * step)] for i in range(min(count, len(images)))]


@torch.no_grad()
def _evaluate(cfg: CfgNode, teacher: Teacher, name: str, images: List[Dict[str, Any]]) -> float:
    """Box AP in percent; 0 where nothing is detected."""
    evaluator = COCOEvaluator(name, distributed=False, use_fast_impl=False)
    mapper = DatasetMapper(cfg, is_train=False)
    evaluator.reset()
    for image in images:
        inputs = [mapper(image)]
        outputs = teacher.model(teacher.batch(inputs, cfg.INPUT.FORMAT))
        evaluator.process(inputs, outputs)
    results = evaluator.evaluate(img_ids=[x["image_id"] for x in images])
    ap = results.get("bbox", {}).get("AP", 0.0)
    return 0.0 if math.isnan(ap) else ap
