"""Apply the options of a teacher, each in place."""

import copy
import logging
from dataclasses import replace
from typing import Any, Callable, Dict, Tuple

import torch
from torch import nn

from detectron2.modeling.poolers import ROIPooler

from ..views.roi_align import float_for_boxes
from .build import Teacher
from .compiled import CompiledBackbone
from .fold_norms import fold_norms
from .options import PRECISIONS, TeacherOptions

logger = logging.getLogger(__name__)


def speed_up(teacher: Teacher, option: str) -> None:
    """
    Args:
        option: one of `teacher.options.steps`, of which each is applied once, in their order
    """
    _STEPS[option](teacher)


def with_options(plain: Teacher, options: TeacherOptions) -> Teacher:
    """A copy of a teacher to which no option has been applied, with all of these."""
    teacher = replace(plain, model=copy.deepcopy(plain.model), options=options)
    for option in options.steps:
        speed_up(teacher, option)
    return teacher


def _fold_norms(teacher: Teacher) -> None:
    if not fold_norms(teacher.model):
        logger.warning("DISTILL.TEACHER.FOLD_NORMS: the teacher has no norm that can be folded.")


def _channels_last(teacher: Teacher) -> None:
    teacher.model.to(memory_format=torch.channels_last)


def _precision(teacher: Teacher) -> None:
    teacher.dtype = PRECISIONS[teacher.options.precision]
    # Autocast would cast these in every step: it keeps copies of trained weights alone.
    for module in teacher.model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(teacher.dtype)
        if isinstance(module, ROIPooler):  # of its own detections; views pool by themselves
            module.register_forward_pre_hook(_exact_boxes)


def _exact_boxes(pooler: nn.Module, inputs: Tuple[Any, ...]) -> Tuple[Any, ...]:
    maps, *boxes = inputs
    return (float_for_boxes(maps), *boxes)


def _compile(teacher: Teacher) -> None:
    teacher.compiled = CompiledBackbone(teacher.model)


_STEPS: Dict[str, Callable[[Teacher], None]] = {
    "fold_norms": _fold_norms,
    "channels_last": _channels_last,
    "precision": _precision,
    "compile": _compile,
}
