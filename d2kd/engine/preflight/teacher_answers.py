"""What heads read of their teacher."""

from typing import Any, Dict, List, Optional

import torch
from torch import Tensor

from detectron2.structures import Boxes

from ...distiller import Distiller
from ...lesson import Lesson
from ...teacher import Teacher


@torch.no_grad()
def teacher_answers(
    distiller: Distiller,
    lesson: Lesson,
    inputs: List[Dict[str, Any]],
    teacher: Optional[Teacher] = None,
) -> Dict[str, Tensor]:
    """
    Args:
        lesson: of the distiller
        inputs: a batch as of the data loader
        teacher: the same detector with other options; None: the lesson's

    Returns:
        the features of each level that heads read, of all where no head says which; the logits,
        deltas and class tower of each level, and logits and deltas of a box that is the image, with
        its mask and what the mask is predicted from, where heads require them
    """
    view = distiller.view_of_teacher(inputs, lesson, teacher)
    answers = {k: view.features[k] for k in distiller.read_levels(lesson.heads) or view.features}
    if any(x == "dense" or x.startswith("tower_") for x in lesson.requires):
        dense = view.dense()
        answers.update({f"{k} logits": x for k, x in dense.by_level(dense.logits).items()})
        answers.update({f"{k} deltas": x for k, x in dense.by_level(dense.deltas).items()})
    if "region_vectors" in lesson.requires and not view.two_stage:
        dense = view.dense()
        answers.update({f"{k} tower": x for k, x in dense.by_level(dense.tower).items()})
    images = [
        Boxes(torch.tensor([[0.0, 0.0, w, h]], device=distiller.device))
        for h, w in view.image_sizes
    ]
    if view.two_stage and lesson.requires & {"roi_predictions", "region_vectors"}:
        predictions = view.roi_predictions(images)
        answers.update({"box logits": predictions.logits, "box deltas": predictions.deltas})
    if "mask_logits" in lesson.requires:
        answers["mask logits"] = view.mask_logits(images)
    if "mask_features" in lesson.requires:
        answers["mask features"] = view.mask_features(images)
    return answers
