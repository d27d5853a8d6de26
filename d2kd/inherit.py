"""Initialise parts of the student from the teacher ("inheriting strategy" of FGD and MGD)."""

import logging
import re
from typing import Any, Iterator, List, Mapping

import torch
from tabulate import tabulate
from torch import Tensor, nn

from .views import describe_detector
from .weights.coverage import has_neck, part_of

logger = logging.getLogger(__name__)

PARTS = ("neck", "head")

# Layers of Detectron2's detectors with rows per class -> number of rows of a class-agnostic one.
PER_CLASS = {r"cls_score": 0, r"box_predictor.*bbox_pred": 4, r"mask_head\.predictor": 1}

# Layers with rows per anchor, and layers that predict boxes.
PER_ANCHOR = (
    r"^(head|proposal_generator)\..*(cls_score|bbox_pred|objectness_logits|anchor_deltas)\."
)
BOXES = r"(bbox_pred|anchor_deltas)\."


@torch.no_grad()
def inherit(
    student: nn.Module, teacher: nn.Module, parts: List[str], same_classes: bool = True
) -> List[str]:
    """
    Copy the teacher's entries to the student's entries of the same name and shape, and log them.

    Args:
        parts: "neck" (pyramid), "head" (everything that predicts)
        same_classes: class i of one is class i of the other; if False, layers with rows per class
            are not copied, even if their shapes agree

    Returns:
        names of the copied entries

    Raises:
        ValueError: an unknown part, or one without any matching entry
    """
    target, source = student.state_dict(), teacher.state_dict()
    other_anchors = _have_other_anchors(student, teacher)
    rows, copied = [], []
    for part in parts:
        keys = [k for k in target if part_of(k, has_neck(student)) == part]
        reasons = {
            k: _shape_mismatch(k, source, target)
            or _meaning_mismatch(k, student, teacher, same_classes, other_anchors)
            for k in keys
        }
        fits = [k for k in keys if not reasons[k]]
        if not fits:
            raise ValueError(
                f"DISTILL.INHERIT: no entry of the student's {part!r} matches the teacher's in "
                f"name and shape. Remove {part!r} from the list for this pair."
            )
        for k in fits:
            target[k].copy_(source[k])
        copied += fits
        skipped = [f"{k} ({reason})" for k, reason in reasons.items() if reason]
        rows.append([part, f"{len(fits)} of {len(keys)}", "\n".join(skipped) or "-"])
    table = tabulate(rows, headers=["part", "entries copied", "skipped"], tablefmt="simple")
    logger.info(f"The student inherits from the teacher:\n{table}")
    return copied


def _shape_mismatch(key: str, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str:
    """Why an entry differs in name or shape; "" if it does not."""
    if key not in source:
        return "not in the teacher"
    if source[key].shape != target[key].shape:
        return f"teacher {tuple(source[key].shape)}, student {tuple(target[key].shape)}"
    return ""


def _meaning_mismatch(
    key: str, student: nn.Module, teacher: nn.Module, same_classes: bool, other_anchors: bool
) -> str:
    """Why an entry of the same name and shape has another meaning; "" if it has the same."""
    if not same_classes:
        per_class = [rows for layer, rows in PER_CLASS.items() if re.search(layer, key)]
        if any(len(student.get_parameter(key)) > rows for rows in per_class):
            return "different classes"
    if other_anchors and re.search(PER_ANCHOR, key):
        return "different anchors"
    theirs, ours = list(_owners(key, teacher)), list(_owners(key, student))
    if re.search(BOXES, key) and _box_coding(theirs) != _box_coding(ours):
        return "different box coding"
    if (
        "box_predictor" in key
        and "cls_score" in key
        and _found(theirs, "use_sigmoid_ce") != _found(ours, "use_sigmoid_ce")
    ):
        return "softmax versus sigmoids"
    if isinstance(theirs[0], nn.GroupNorm) != isinstance(ours[0], nn.GroupNorm):
        return f"teacher {type(theirs[0]).__name__}, student {type(ours[0]).__name__}"
    if "top_block" in key and _found(theirs, "in_feature") != _found(ours, "in_feature"):
        return (
            f"from {_found(theirs, 'in_feature')}, the student's from {_found(ours, 'in_feature')}"
        )
    return ""


def _owners(key: str, model: nn.Module) -> Iterator[nn.Module]:
    """The modules that contain a state_dict entry, innermost first."""
    path = key.split(".")[:-1]
    for end in range(len(path), -1, -1):
        yield model.get_submodule(".".join(path[:end]))


def _found(owners: List[nn.Module], attribute: str) -> Any:
    """The attribute of the innermost module that has it; None if none has."""
    return next((getattr(x, attribute) for x in owners if hasattr(x, attribute)), None)


def _box_coding(owners: List[nn.Module]) -> Any:
    transform = _found(owners, "box2box_transform")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(transform).items()}
    return type(transform).__name__, values


def _have_other_anchors(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether the anchors, or their order, differ at any stride at which both predict."""
    infos = [describe_detector(x, "detector") for x in (student, teacher)]
    ours, theirs = (
        {info.shapes[level].stride: anchors for level, anchors in info.anchors.items()}
        for info in infos
    )
    return any(ours[k] != theirs[k] for k in ours.keys() & theirs.keys())
