"""Initialise parts of the student from the teacher ("inheriting strategy" of FGD and MGD)."""

import logging
import re
from typing import List, Mapping

import torch
from tabulate import tabulate
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]

PARTS = ("neck", "head")

# Layers with rows of their own for each class, in Detectron2's detectors, and how many a
# class-agnostic one has.
PER_CLASS = {r"cls_score": 0, r"box_predictor.*bbox_pred": 4, r"mask_head\.predictor": 1}


def part_of(key: str) -> str:
    """Which part of a detector an entry of its state_dict belongs to."""
    if not key.startswith("backbone."):
        return "head"
    return "backbone" if key.startswith("backbone.bottom_up.") else "neck"


@torch.no_grad()
def inherit(
    student: nn.Module, teacher: nn.Module, parts: List[str], same_classes: bool = True
) -> List[str]:
    """
    Copy the teacher's entries into the student's of the same name and shape; log what was copied.

    Args:
        parts: "neck" (pyramid), "head" (all that predicts)
        same_classes: class i of one is class i of the other; else layers that have rows for each
            class are left as they are, whatever their shapes

    Returns:
        names of the copied entries

    Raises:
        ValueError: an unknown part, or one of which nothing fits
    """
    target, source = student.state_dict(), teacher.state_dict()
    rows, copied = [], []
    for part in parts:
        keys = [k for k in target if part_of(k) == part]
        fits = [k for k in keys if not _why(k, source, target, same_classes)]
        if not fits:
            raise ValueError(
                f"DISTILL.INHERIT: nothing of the student's {part!r} has the name and shape of the "
                f"teacher's. Take {part!r} out of the list for this pair."
            )
        for k in fits:
            target[k].copy_(source[k])
        copied += fits
        skipped = [f"{k} ({_why(k, source, target, same_classes)})" for k in keys if k not in fits]
        rows.append([part, f"{len(fits)} of {len(keys)}", "\n".join(skipped) or "-"])
    table = tabulate(rows, headers=["part", "entries copied", "skipped"], tablefmt="simple")
    logger.info(f"The student inherits from the teacher:\n{table}")
    return copied


def _why(key: str, source: Tensors, target: Tensors, same_classes: bool) -> str:
    """A reason why an entry cannot be copied; "" if it can."""
    if key not in source:
        return "not in the teacher"
    if source[key].shape != target[key].shape:
        return f"teacher {tuple(source[key].shape)}, student {tuple(target[key].shape)}"
    if same_classes:
        return ""
    by_class = (re.search(k, key) and len(target[key]) > rows for k, rows in PER_CLASS.items())
    return "the classes are others" if any(by_class) else ""
