"""What a student starts from."""

from torch import nn

from ..checkpoint import PlainCheckpointer, load_initial_weights
from ..distiller import Distiller
from .preflight.own_pyramid import warn_of_own_pyramid


def initialise(model: nn.Module, checkpointer: PlainCheckpointer, weights: str) -> None:
    """
    Load MODEL.WEIGHTS, then what DISTILL.INHERIT takes from the teacher.

    Args:
        model: a Distiller or a plain detector
        checkpointer: of the model
        weights: MODEL.WEIGHTS; empty: the student stays as it was drawn

    Raises:
        ValueError: not a checkpoint, or one that covers less than half of every part of the student
    """
    load_initial_weights(checkpointer, weights)
    if isinstance(model, Distiller):
        model.inherit_from_teacher()
        if weights:
            warn_of_own_pyramid(model, checkpointer.missing_keys)
