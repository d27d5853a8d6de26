"""Checks at numerical limits: saturated classifiers and padded images."""

import torch
from torch import nn

from .batches import batch
from .case import Case
from .detectors import classifier
from .gradients import backward, check_head_gradients


def check_extreme_logits(case: Case) -> None:
    """Losses and gradients are finite for class logits of +120 and -120, equal or opposite."""
    distiller = case.fresh(own_teacher=True)
    saturate(distiller.teacher.model, 1)
    for sign, what in ((1, "equal to"), (-1, "the opposite of")):
        saturate(distiller.student, sign)
        backward(
            case,
            distiller,
            what=f" when all class logits are +120 or -120, the student's {what} the teacher's. "
            "In float32 softmax and sigmoid are then exactly 0 and 1: use log_softmax, "
            "F.logsigmoid or the losses with logits",
        )


def saturate(detector: nn.Module, sign: int) -> None:
    """Saturate a detector's classifier: logits +120, -120, +120, ... times `sign`."""
    score = classifier(detector)
    with torch.no_grad():
        score.weight.zero_()
        score.bias.fill_(120.0 * sign)
        score.bias[1::2] *= -1


def check_image_sizes(case: Case) -> None:
    """Losses and gradients are finite for images of different sizes, padded to one."""
    inputs = batch(1, height=64, width=64) + batch(1, height=48, width=80, seed=1)
    distiller, what = case.fresh(), " for a batch of a 64 x 64 and a 48 x 80 image"
    backward(case, distiller, inputs, what)
    check_head_gradients(case, distiller, what)
