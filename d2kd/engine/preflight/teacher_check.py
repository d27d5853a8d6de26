"""Before the first step: does the teacher detect anything in this data?"""

import logging
import math
import os
from typing import Any, Dict, List, Optional, Tuple

import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances
from detectron2.utils import comm

from ...config.lessons import lesson_configs
from ...data.coco_json import look_at
from ...data.mapper import CheckedMapper
from ...distiller import Distiller
from ...labelling.inference import Collector
from ...modeling.backbone_teacher import BackboneTeacher
from ...pairing.classes import CommonClasses
from ...pairing.pair import DistillPair
from ...teacher import Teacher
from ...views import describe_detector, exact_boxes
from ..evaluator import CompleteCOCOEvaluator
from ..facts import write_fact
from .disagreement import tell_disagreement

logger = logging.getLogger(__name__)


def check_teachers(cfg: CfgNode, distiller: Distiller, stage: str = "") -> None:
    """
    :func:`check_teacher` for each of a run or stage.

    Args:
        stage: name of the stage, whose one teacher is named by it; "" of a run without stages
    """
    for lesson, own in zip(distiller.lessons, lesson_configs(cfg)):
        with own.in_errors():
            check_teacher(own.cfg, lesson.teacher, lesson.pair, lesson.name or stage)


def check_teacher(
    cfg: CfgNode, teacher: Teacher, pair: Optional[DistillPair] = None, name: str = ""
) -> None:
    """
    Evaluate the teacher on a part of the first test set, as it sees images in training: at the
    student's size. Weights can load completely and still be wrong for the data: other classes,
    another channel order, other PIXEL_STD.

    Args:
        cfg: of the run, whose data sets are registered
        pair: its common classes are evaluated; None: all classes
        name: of the teacher, among several, in the log and in the names of files

    Raises:
        ValueError: its AP is below DISTILL.TEACHER.MIN_AP
    """
    if not cfg.DISTILL.TEACHER.EVAL_IMAGES:
        return
    # Only the main process evaluates; the others wait, and raise with it, on other machines too.
    problem = _problem(cfg, teacher, pair, name) if comm.is_main_process() else ""
    problem = comm.all_gather(problem)[0]
    if problem:
        raise ValueError(problem)


def _problem(cfg: CfgNode, teacher: Teacher, pair: Optional[DistillPair], of: str) -> str:
    """Evaluate and log the AP; returns an error message if it is too low, else ""."""
    node = cfg.DISTILL.TEACHER
    classes = None if pair is None or pair.same_classes else pair.classes
    whose = f"{of}: " if of else ""
    reason = _reason_to_skip(cfg, teacher)
    # Before the classes are compared: loading the set registers their names with Detectron2.
    images = (
        [] if reason else evenly_spaced(DatasetCatalog.get(cfg.DATASETS.TEST[0]), node.EVAL_IMAGES)
    )
    reason = reason or _other_classes(cfg, teacher, classes)
    if not reason and not any(_has_object(x, classes) for x in images):
        what = "object of the common classes" if classes else "object"
        reason = f"there is no {what} in {len(images)} images of {cfg.DATASETS.TEST[0]}"
    if reason:
        logger.warning(f"{whose}The teacher is not evaluated: {reason}.")
        _write_result(cfg, teacher, not_evaluated=reason)
        return ""
    name = cfg.DATASETS.TEST[0]
    where = f"on {len(images)} images of {name}"
    if classes:
        evaluated = len(set(classes.student_class.values()))
        where += f", {evaluated} of its {len(classes.student_names)} classes,"
    ap, mask_ap, by_class = _evaluate(cfg, teacher, of, images, classes)
    masks = "" if mask_ap is None else f", {mask_ap:.1f} of masks,"
    logger.info(f"{whose}The teacher has {ap:.1f} AP{masks} {where.rstrip(',')}.")
    found = {"ap": ap, "mask_ap": mask_ap, "by_class": by_class}
    _write_result(cfg, teacher, where=where.rstrip(","), **found)
    if ap >= node.MIN_AP:
        return ""
    return (
        f"DISTILL.TEACHER: {where} it has {ap:.2f} AP, less than DISTILL.TEACHER.MIN_AP "
        f"{node.MIN_AP}. Is it trained for these classes, in this order? Are MODEL.PIXEL_MEAN, "
        "PIXEL_STD and INPUT.FORMAT in its config those that it was trained with? (EVAL_IMAGES "
        "0 does not ask.)"
    )


def _write_result(cfg: CfgNode, teacher: Teacher, **result: Any) -> None:
    sha256 = teacher.manifest["weights_sha256"]
    write_fact(cfg.OUTPUT_DIR, "teacher_ap", weights_sha256=sha256, **result)


def _reason_to_skip(cfg: CfgNode, teacher: Teacher) -> str:
    """Why the teacher cannot be evaluated; "" if it can."""
    if not teacher.manifest["weights_sha256"]:
        return "its weights are random"
    if isinstance(teacher.model, BackboneTeacher):
        return "it has features and detects nothing"
    if not cfg.DATASETS.TEST:
        return "DATASETS.TEST is empty"
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    if metadata.get("evaluator_type") != "coco" or not metadata.get("json_file"):
        return f"{metadata.name} is not in COCO's format"
    return ""


def _other_classes(cfg: CfgNode, teacher: Teacher, classes: Optional[CommonClasses]) -> str:
    """Why the teacher's classes are not those of the test set; "" if they are."""
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    if classes:
        if list(classes.student_names) != list(metadata.thing_classes):
            return f"{metadata.name} has other classes than the student"
        return "" if classes.student_class else "no class of it is one class of the student's"
    count = describe_detector(teacher.model, "teacher").num_classes
    if count != len(metadata.thing_classes):
        return f"it has {count} classes, {metadata.name} {len(metadata.thing_classes)}"
    return ""


def _has_object(image: Dict[str, Any], classes: Optional[CommonClasses]) -> bool:
    """Whether the image has an object of an evaluated class."""
    if "annotations" not in image:  # of a set without annotations
        return True
    objects = {x["category_id"] for x in image["annotations"] if not x.get("iscrowd", 0)}
    return bool(objects & set(classes.student_class.values()) if classes else objects)


def evenly_spaced(images: List[Dict[str, Any]], count: int) -> List[Dict[str, Any]]:
    """At most `count` of them, evenly spaced: data sets are often sorted."""
    step = max(len(images) / count, 1)
    return [images[int(i * step)] for i in range(min(count, len(images)))]


@torch.no_grad()
def _evaluate(
    cfg: CfgNode,
    teacher: Teacher,
    of: str,
    images: List[Dict[str, Any]],
    classes: Optional[CommonClasses],
) -> Tuple[float, Optional[float], List[List[Any]]]:
    """
    Box AP and mask AP in percent, each a mean over the common classes, 0 where nothing is detected;
    the second is None without masks. And the rows of tell_disagreement.
    """
    name = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(name)
    # A set that a user has registered may have no other ids
    same_ids = {i: i for i in range(len(metadata.thing_classes))}
    ids = metadata.get("thing_dataset_id_to_contiguous_id", same_ids)
    taught = set(classes.student_class.values()) if classes else set(ids.values())
    categories = {index: number for number, index in ids.items() if index in taught}
    collector = Collector(categories)
    # On an object with lines for polygons pycocotools fails; Detectron2's `images` are without it.
    has_lines = bool(look_at(metadata.json_file, name).facts.broken)
    have_masks = not has_lines and _have_masks(teacher, images)
    tasks = ("bbox", "segm") if have_masks else ("bbox",)
    evaluator = CompleteCOCOEvaluator(name, tasks=tasks, distributed=False)
    mapper = CheckedMapper(cfg, is_train=False)
    evaluator.reset()
    for image in images:
        inputs = [mapper(image)]
        with teacher.autocast(), exact_boxes(teacher.model):
            outputs = teacher.model(teacher.batch(inputs, cfg.INPUT.FORMAT))
        if classes:
            outputs = [
                {"instances": _remap_classes(x["instances"], classes.student_class)}
                for x in outputs
            ]
        evaluator.process(inputs, outputs)
        collector.process(inputs, outputs)
    path = os.path.join(cfg.OUTPUT_DIR, f"teacher_{of}_worst" if of else "teacher_worst")
    truth, found = evaluator._coco_api, collector.evaluate()
    rows = tell_disagreement(truth, images, found, list(categories.values()), path)
    results = evaluator.evaluate(img_ids=[x["image_id"] for x in images])
    box_ap, *mask_ap = (_mean_ap(results.get(x, {}), classes) for x in tasks)
    return box_ap, mask_ap[0] if mask_ap else None, rows


def _have_masks(teacher: Teacher, images: List[Dict[str, Any]]) -> bool:
    """A data set of boxes has nothing to compare a Mask R-CNN's masks with."""
    objects = [x for image in images for x in image.get("annotations", ())]
    of_teacher = getattr(getattr(teacher.model, "roi_heads", None), "mask_on", False)
    return of_teacher and bool(objects) and all(x.get("segmentation") for x in objects)


def _mean_ap(results: Dict[str, float], classes: Optional[CommonClasses]) -> float:
    found = [results.get("AP", 0.0)]
    if classes and len(classes.student_names) > 1:  # of one class there are no APs by class
        names = [classes.student_names[i] for i in set(classes.student_class.values())]
        found = [results.get(f"AP-{x}", 0.0) for x in names]
    found = [x for x in found if not math.isnan(x)]  # a class of which these images have no object
    return sum(found) / max(len(found), 1)


def _remap_classes(detections: Instances, class_map: Dict[int, int]) -> Instances:
    """Detections of the mapped classes, with the student's class indices."""
    found = [i for i, x in enumerate(detections.pred_classes.tolist()) if x in class_map]
    detections = detections[torch.tensor(found, dtype=torch.int64)]
    classes = [class_map[x] for x in detections.pred_classes.tolist()]
    detections.pred_classes = detections.pred_classes.new_tensor(classes)
    return detections
