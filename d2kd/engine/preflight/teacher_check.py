"""Before the first step: does the teacher know anything of this data?"""

import logging
import math
from typing import Any, Dict, List, Optional

import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances
from detectron2.utils import comm

from ...data.mapper import CheckedMapper
from ...pairing.classes import CommonClasses
from ...pairing.pair import DistillPair
from ...teacher import Teacher
from ...views import find_view
from ..evaluator import CompleteCOCOEvaluator

logger = logging.getLogger(__name__)


def check_teacher(cfg: CfgNode, teacher: Teacher, pair: Optional[DistillPair] = None) -> None:
    """
    Evaluate the teacher on a part of the first test set, as it sees images in training: at the
    student's size. A teacher can be whole and still be the wrong one: other classes, channels in
    another order, pixels divided by another deviation.

    Args:
        cfg: of the run, whose data sets are registered
        pair: tells the classes that teacher and student share, on which it is evaluated; None: all

    Raises:
        ValueError: its AP is below DISTILL.TEACHER.MIN_AP
    """
    if not cfg.DISTILL.TEACHER.EVAL_IMAGES:
        return
    # The main process asks. The others wait here, and are refused with it, on other machines too.
    problem = comm.all_gather(_problem(cfg, teacher, pair) if comm.is_main_process() else "")[0]
    if problem:
        raise ValueError(problem)


def _problem(cfg: CfgNode, teacher: Teacher, pair: Optional[DistillPair]) -> str:
    """Evaluate, and say in the log what was found; "" unless it is too little."""
    node = cfg.DISTILL.TEACHER
    classes = None if pair is None or pair.same_classes else pair.classes
    reason = _why_not(cfg, teacher)
    # Read before the classes are compared: it tells Detectron2 their names.
    images = [] if reason else _some(DatasetCatalog.get(cfg.DATASETS.TEST[0]), node.EVAL_IMAGES)
    reason = reason or _other_classes(cfg, teacher, classes)
    if not reason and not any(_has_object(x, classes) for x in images):
        what = "object of the common classes" if classes else "object"
        reason = f"there is no {what} in {len(images)} images of {cfg.DATASETS.TEST[0]}"
    if reason:
        logger.warning(f"The teacher is not evaluated: {reason}.")
        return ""
    name = cfg.DATASETS.TEST[0]
    where = f"on {len(images)} images of {name}"
    if classes:
        evaluated = len(set(_places(classes).values()))
        where += f", {evaluated} of its {len(classes.student_names)} classes,"
    ap = _evaluate(cfg, teacher, name, images, classes)
    logger.info(f"The teacher has {ap:.1f} AP {where.rstrip(',')}.")
    if ap >= node.MIN_AP:
        return ""
    return (
        f"DISTILL.TEACHER: {where} it has {ap:.2f} AP, less than DISTILL.TEACHER.MIN_AP "
        f"{node.MIN_AP}. Is it trained for these classes, in this order? Are MODEL.PIXEL_MEAN, "
        "PIXEL_STD and INPUT.FORMAT in its config those that it was trained with? (EVAL_IMAGES "
        "0 does not ask.)"
    )


def _why_not(cfg: CfgNode, teacher: Teacher) -> str:
    """A reason why the teacher cannot be evaluated; "" if it can."""
    if not teacher.manifest["weights_sha256"]:
        return "its weights are random"
    if not cfg.DATASETS.TEST:
        return "DATASETS.TEST is empty"
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    if metadata.get("evaluator_type") != "coco" or not metadata.get("json_file"):
        return f"{metadata.name} is not in COCO's format"
    return ""


def _other_classes(cfg: CfgNode, teacher: Teacher, classes: Optional[CommonClasses]) -> str:
    """A reason why its classes have no place in the test set; "" if they have."""
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    if classes:
        if list(classes.student_names) != list(metadata.thing_classes):
            return f"{metadata.name} has other classes than the student"
        return "" if _places(classes) else "no class of it is one class of the student's"
    count = find_view(teacher.model, "teacher").num_classes(teacher.model)
    if count != len(metadata.thing_classes):
        return f"it has {count} classes, {metadata.name} {len(metadata.thing_classes)}"
    return ""


def _places(classes: CommonClasses) -> Dict[int, int]:
    """The teacher's classes to the student's, where that is one and not several joined ones."""
    pairs = zip(classes.student, classes.teacher)
    return {t: ours[0] for ours, theirs in pairs if len(ours) == 1 for t in theirs}


def _has_object(image: Dict[str, Any], classes: Optional[CommonClasses]) -> bool:
    """Whether there is something to be found, of the classes that are evaluated."""
    if "annotations" not in image:  # of a set that does not tell
        return True
    objects = {x["category_id"] for x in image["annotations"] if not x.get("iscrowd", 0)}
    return bool(objects & set(_places(classes).values()) if classes else objects)


def _some(images: List[Dict[str, Any]], count: int) -> List[Dict[str, Any]]:
    """At most `count` of them, at equal distances: sets are often sorted."""
    step = max(len(images) / count, 1)
    return [images[int(i * step)] for i in range(min(count, len(images)))]


@torch.no_grad()
def _evaluate(
    cfg: CfgNode,
    teacher: Teacher,
    name: str,
    images: List[Dict[str, Any]],
    classes: Optional[CommonClasses],
) -> float:
    """Box AP in percent, a mean over the common classes; 0 where nothing is detected."""
    # Boxes alone: a data set of boxes has nothing to compare a Mask R-CNN's masks with.
    evaluator = CompleteCOCOEvaluator(name, tasks=("bbox",), distributed=False)
    mapper = CheckedMapper(cfg, is_train=False)
    evaluator.reset()
    for image in images:
        inputs = [mapper(image)]
        outputs = teacher.model(teacher.batch(inputs, cfg.INPUT.FORMAT))
        if classes:
            outputs = [{"instances": _in_place(x["instances"], _places(classes))} for x in outputs]
        evaluator.process(inputs, outputs)
    results = evaluator.evaluate(img_ids=[x["image_id"] for x in images]).get("bbox", {})
    found = [results.get("AP", 0.0)]
    if classes and len(classes.student_names) > 1:  # of one class there are no APs by class
        names = [classes.student_names[i] for i in set(_places(classes).values())]
        found = [results.get(f"AP-{x}", 0.0) for x in names]
    found = [x for x in found if not math.isnan(x)]  # a class of which these images have no object
    return sum(found) / max(len(found), 1)


def _in_place(detections: Instances, places: Dict[int, int]) -> Instances:
    """Detections of classes that have a place, with the student's class indices."""
    found = [i for i, x in enumerate(detections.pred_classes.tolist()) if x in places]
    detections = detections[torch.tensor(found, dtype=torch.int64)]
    classes = [places[x] for x in detections.pred_classes.tolist()]
    detections.pred_classes = detections.pred_classes.new_tensor(classes)
    return detections
