"""Initialise parts of the student from the teacher ("inheriting strategy" of FGD and MGD)."""

import logging
from typing import List

import torch
from tabulate import tabulate
from torch import nn

logger = logging.getLogger(__name__)

PARTS = ("neck", "head")


def part_of(key: str) -> str:
    """Which part of a detector an entry of its state_dict belongs to."""
    if not key.startswith("backbone."):
        return "head"
    return "backbone" if key.startswith("backbone.bottom_up.") else "neck"


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module, parts: List[str]) -> List[str]:
    """
    Copy the teacher's entries into the student's of the same name and shape; log what was copied.

    Args:
        parts: "neck" (pyramid), "head" (all that predicts)

    Returns:
        names of the copied entries

    Raises:
        ValueError: an unknown part, or one of which nothing fits
    """
    target, source = student.state_dict(), teacher.state_dict()
    rows, copied = [], []
    for part in parts:
        keys = [k for k in target if part_of(k) == part]
        fits = [k for k in keys if k in source and source[k].shape == target[k].shape]
        if not fits:
            raise ValueError(
                f"DISTILL.INHERIT: nothing of the student's {part!r} has the name and shape of the "
                f"teacher's. Take {part!r} out of the list for this pair."
            )
        for k in fits:
            target[k].copy_(source[k])
        copied += fits
        skipped = [f"{k} {_why(k, source, target)}" for k in keys if k not in fits]
        rows.append([part, f"{len(fits)} of {len(keys)}", "\n".join(skipped) or "-"])
    table = tabulate(rows, headers=["part", "entries copied", "skipped"], tablefmt="simple")
    logger.info(f"The student inherits from the teacher:\n{table}")
    return copied


def _why(key: str, source, target) -> str:
    if key not in source:
        return "(not in the teacher)"
    return f"(teacher {tuple(source[key].shape)}, student {tuple(target[key].shape)})"
