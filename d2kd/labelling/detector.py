"""The detector that labels, and which of its classes is which category of the labelled set."""

import logging
from typing import Dict

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from ..checkpoint import check_is_file, load_whole_detector
from ..config import student_config
from ..data import class_names
from ..engine.preflight.check_config import check_config
from ..engine.stages import plan_stages
from ..pairing.classes import common_classes
from ..teacher import Teacher, build_teacher
from ..teacher.manifest import identity, make_manifest
from ..utils.packaged import find_file
from ..views import describe_detector
from .labelled_set import LabelledSet

logger = logging.getLogger(__name__)


def load_detector(cfg: CfgNode, use_teacher: bool) -> Teacher:
    """
    Args:
        use_teacher: take DISTILL.TEACHER, of several stages the last one's; else the config's own
            detector, with MODEL.WEIGHTS

    Raises:
        ValueError, FileNotFoundError: config or weights missing or not fitting
    """
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS is True: this detector needs a file of proposals for each image, "
            "and so cannot label others."
        )
    own = student_config(cfg)
    check_config(own, evaluation=True)
    if use_teacher:
        last = plan_stages(cfg)[-1].cfg
        if last.DISTILL.TEACHERS:
            raise ValueError(
                f"DISTILL.TEACHERS has {len(last.DISTILL.TEACHERS)} teachers, and --teacher labels "
                "with one. Label with the config of one of them and its MODEL.WEIGHTS."
            )
        if last.DISTILL.TEACHER.BACKBONE:
            raise ValueError(
                f"DISTILL.TEACHER.BACKBONE {last.DISTILL.TEACHER.BACKBONE!r} has features and "
                "detects nothing, so it cannot label."
            )
        return build_teacher(last)
    weights = find_file(own.MODEL.WEIGHTS)
    if not weights:
        raise ValueError(
            "MODEL.WEIGHTS is empty: name the detector's checkpoint, or add --teacher to take "
            "DISTILL.TEACHER."
        )
    if "://" not in weights:
        check_is_file(weights, "MODEL.WEIGHTS")
    model = build_model(own)
    load_whole_detector(model, weights, "MODEL.WEIGHTS", own)
    manifest = make_manifest(identity(own), weights)
    return Teacher(model.eval(), own.INPUT.FORMAT, manifest, class_names(own))


def category_ids(
    cfg: CfgNode, detector: Teacher, labelled: LabelledSet, use_teacher: bool
) -> Dict[int, int]:
    """
    A teacher's classes are matched by name, as in a distillation; those of the config's own
    detector are the labelled set's, which :func:`read_labelled_set` has checked.

    Returns:
        the detector's class to the labelled set's category id; other classes are not labelled

    Raises:
        ValueError: they have no class in common
    """
    ids = [x["id"] for x in labelled.categories]
    if not use_teacher:
        return dict(enumerate(ids))
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN = (labelled.name,)  # it defines the classes here
    count = describe_detector(detector.model, "teacher").num_classes
    classes = common_classes(cfg, len(ids), count, detector.class_names)
    if classes is None and count != len(ids):
        raise ValueError(
            f"DISTILL.TEACHER: it has {count} classes, whose names are unknown, and "
            f"{labelled.name} has {len(ids)}. Set DISTILL.TEACHER.CLASSES."
        )
    if classes is None:
        return dict(enumerate(ids))
    logger.info(f"Classes, {labelled.name}'s <- teacher's:\n{classes}")
    if not classes.student_class:
        raise ValueError(
            f"DISTILL.TEACHER: no class of it is one class of {labelled.name}:\n{classes}"
        )
    return {theirs: ids[ours] for theirs, ours in classes.student_class.items()}
