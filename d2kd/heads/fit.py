"""Whether a head can take a pair of detectors, and why not."""

from typing import FrozenSet, Iterable, Optional, Sequence, Type

from torch import nn

from detectron2.config import CfgNode

from ..pairing.pair import ANY_PAIR, DENSE, TWO_STAGE, DistillPair
from ..utils.checks import shown
from ..views import DetectorInfo, anchor_order
from .registry import compares_logits, head_class

# What of a view comes from boxes, of images without labels from the teacher's detections
OF_BOXES = frozenset({"gt_instances", "regions"})


def misfit(name: str, cfg: CfgNode, pair: DistillPair) -> Optional[str]:
    """Why the head cannot take the pair, a sentence; None: it can."""
    cls, student, teacher = head_class(name), pair.student, pair.teacher
    names = f"teacher {teacher.name}, student {student.name}"
    pairs = getattr(cls, "pairs", ANY_PAIR)
    if pair.kind not in pairs:
        return f"{name} takes {_listed(pairs)}; this is {pair.kind} ({names})."
    requires = requires_of(cls, cfg, pair)
    for side, detector in (("student", student), ("teacher", teacher)):
        missing = requires - detector.provides - {"gt_instances"}
        if missing:
            by_depth = f"tower_{cfg.DISTILL[name].get('DEPTH')}" in missing
            asked = f" (DISTILL.{name}.DEPTH)" if by_depth else ""
            return (
                f"{name} needs {_listed(missing)}{asked}; the {side} {detector.name} has none. It "
                f"has {_listed(detector.provides)}."
            )
    if "roi_predictions" in requires and pair.kind in TWO_STAGE:
        problem = _other_activation(name, pair)
        if problem:
            return problem
    return _other_logits(name, pair) if compares_logits(cls) else None


def unlabelled_misfit(name: str, cfg: CfgNode, pair: DistillPair) -> Optional[str]:
    """Why the head cannot learn from images without labels, a sentence; None: it can."""
    requires, key = requires_of(head_class(name), cfg, pair), "DISTILL.UNLABELLED.SETS"
    of_training = {"anchor_labels"}
    if pair.student.two_stage:  # they are the proposals that it samples for its own loss
        of_training |= {"regions", "region_vectors", "roi_predictions"}
        of_training |= {"mask_features", "mask_logits"}
    missing = requires & of_training
    if missing:
        return (
            f"{key}: {name} needs {_listed(missing)}, which a {pair.student.name} has of labelled "
            "images only. Take heads that need none of these (docs/unlabelled.md), or no such sets."
        )
    needs_boxes = requires & OF_BOXES
    if needs_boxes and not cfg.DISTILL.UNLABELLED.BOX_SCORE:
        return (
            f"{key}: {name} needs the boxes of each image. Set DISTILL.UNLABELLED.BOX_SCORE, such "
            "as 0.5: the teacher's detections from this score on stand in."
        )
    if needs_boxes and not pair.teacher.num_classes:
        return f"{key}: {name} needs boxes, and the teacher {pair.teacher.name} detects none."
    return None


def _other_activation(name: str, pair: DistillPair) -> Optional[str]:
    student, teacher = pair.student.class_activation, pair.teacher.class_activation
    key = "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE"
    if student != teacher:
        return (
            f"{name} compares class probabilities, which the student's box head has from a "
            f"{student} and the teacher's from a {teacher}: set {key} alike in both."
        )
    known = getattr(head_class(name), "class_activations", {"softmax"})
    if student not in known:
        return (
            f"{name} takes class probabilities from a {_listed(known)}; the box heads have {key} "
            f"{student == 'sigmoid'}, a {student}."
        )
    return None


def _other_logits(name: str, pair: DistillPair) -> Optional[str]:
    student, teacher = pair.in_common_classes.student, pair.in_common_classes.teacher
    if student.num_classes != teacher.num_classes:
        return (
            f"{name} compares class logits, but the student has {student.num_classes} classes and "
            f"the teacher {teacher.num_classes}, and their names are not known of both. Name the "
            "teacher's in DISTILL.TEACHER.CLASSES: those that are equal are compared."
        )
    if not student.num_classes:
        return f"{name} compares class logits, but the detectors have no class in common."
    return _other_anchors(name, pair) if pair.kind in DENSE else None


def _other_anchors(name: str, pair: DistillPair) -> Optional[str]:
    student, teacher = pair.student, pair.teacher
    differ = [x for x in pair.anchors_of_levels if anchor_order(*x[1:]) is None]
    same_count = student.num_anchors == teacher.num_anchors
    if same_count and not differ:
        return None
    if student.anchor_free or teacher.anchor_free:
        return (
            f"{name} compares logits cell by cell, but the student {student.name} predicts "
            f"{_predicts(student)} and the teacher {teacher.name} {_predicts(teacher)}. Take a "
            f"teacher that is a {student.name}, or a head that compares features or regions."
        )
    if not same_count:
        return (
            f"{name} compares logits cell by cell, but the student has {student.num_anchors} "
            f"anchors per cell and the teacher {teacher.num_anchors} (MODEL.ANCHOR_GENERATOR)."
        )
    level, ours, theirs = differ[0]
    return (
        f"{name} compares logits anchor by anchor, but on {level.student} they differ: the "
        f"student's first cell has {_boxes(ours)}, the teacher's on {level.teacher} "
        f"{_boxes(theirs)}. Train the student with the teacher's SIZES, ASPECT_RATIOS and OFFSET "
        "in MODEL.ANCHOR_GENERATOR."
    )


def _predicts(detector: DetectorInfo) -> str:
    if not detector.anchor_free:
        return f"for {detector.num_anchors} anchors per cell"
    left, _, right, _ = next(iter(detector.anchors.values()))[0]
    return f"from the {'centre' if left + right else 'corner'} of each cell, without anchors"


def _boxes(anchors: Sequence[Sequence[float]]) -> str:
    return shown(["(" + ", ".join(f"{x:g}" for x in anchor) + ")" for anchor in sorted(anchors)])


def requires_of(head: Type[nn.Module], cfg: CfgNode, pair: DistillPair) -> FrozenSet[str]:
    """What the head requires of both views of this pair."""
    requires = getattr(head, "requires", {"features"})
    if not callable(requires):
        return frozenset(requires)
    try:
        return frozenset(requires(cfg, pair))
    except TypeError as error:
        raise ValueError(
            f"{head.__name__}.requires must be a frozenset of names, or a static method of (cfg, "
            f"pair) that returns one: {error}"
        ) from error


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
