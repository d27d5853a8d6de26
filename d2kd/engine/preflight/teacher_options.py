"""Before the first step: make the teacher cheap as DISTILL.TEACHER says, and prove it the same."""

import logging
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ...config.lessons import lesson_configs
from ...data.mapper import CheckedMapper
from ...data.unlabelled import find_unlabelled
from ...distiller import Distiller
from ...lesson import Lesson
from ...teacher import Teacher, TeacherOptions
from ...teacher.speed_up import speed_up
from .teacher_answers import teacher_answers
from .teacher_check import evenly_spaced

logger = logging.getLogger(__name__)

NUM_IMAGES = 3
# Options that only change the order of sums in float32 were measured at 3e-6, bfloat16 at 1e-2.
FLOAT32_BOUND = 1e-3
HALF_BOUND = 5e-2
MIN_COSINE = 0.99

Answers = List[Dict[str, Tensor]]


class Difference(NamedTuple):
    """`error`: norm of the difference over the norm; `cosine`: of the angle between both."""

    error: float
    cosine: float


def apply_options(cfg: CfgNode, distiller: Distiller) -> None:
    """
    Apply the options of each teacher one after the other, each compared with the plain teacher in
    float32 on images of the first training set, or else of those without labels. Without options
    nothing is done.

    Raises:
        ValueError: with an option a teacher does not run, or says something else
    """
    for lesson, own in zip(distiller.lessons, lesson_configs(cfg)):
        if lesson.teacher.options.steps:
            with own.in_errors():
                _apply_options(cfg, distiller, lesson)


def _apply_options(cfg: CfgNode, distiller: Distiller, lesson: Lesson) -> None:
    teacher = lesson.teacher
    mapper, of_training = CheckedMapper(cfg, is_train=False), cfg.DATASETS.TRAIN[:1]
    there = DatasetCatalog.get(of_training[0]) if of_training else find_unlabelled(cfg)
    images = evenly_spaced(there, NUM_IMAGES)
    batches = [[mapper(x)] for x in images]
    plain = _answers(distiller, lesson, batches)
    for option in teacher.options.steps:
        with _in_errors(teacher.options, option):
            speed_up(teacher, option)
            found = _compare(plain, _answers(distiller, lesson, batches))
        _refuse_other(teacher, option, found)
    if teacher.compiled and not teacher.compiled.graphs:
        logger.warning("DISTILL.TEACHER.COMPILE: PyTorch compiled nothing of the teacher.")
    options = ", ".join(map(teacher.options.key, teacher.options.steps))
    rows = [(part, f"{x.error:.1e}", f"{x.cosine:.6f}") for part, x in found.items()]
    table = tabulate(rows, ["part", "relative error", "cosine"], disable_numparse=True)
    logger.info(
        f"The teacher with {options}, against itself without, on {len(images)} training images:\n"
        f"{table}"
    )


def _answers(distiller: Distiller, lesson: Lesson, batches: List[List[Dict[str, Any]]]) -> Answers:
    """On the CPU: the GPU needs its memory for the training."""
    answers = (teacher_answers(distiller, lesson, batch) for batch in batches)
    return [{k: x.cpu() for k, x in found.items()} for found in answers]


def _compare(plain: Answers, found: Answers) -> Dict[str, Difference]:
    """Of each part, over all images."""
    differences = {}
    for part in plain[0]:
        a, b = (torch.cat([x[part].flatten() for x in answers]) for answers in (plain, found))
        a, b = a.double(), b.double()
        # A part that is 0 everywhere must stay so.
        tiny = torch.finfo(a.dtype).tiny
        cosine = torch.cosine_similarity(a, b, dim=0) if a.any() else torch.ones(())
        error = (a - b).norm() / a.norm().clamp(min=tiny)
        differences[part] = Difference(float(error), float(cosine))
    return differences


def _refuse_other(teacher: Teacher, option: str, found: Dict[str, Difference]) -> None:
    half = teacher.dtype in (torch.bfloat16, torch.float16)
    bound = HALF_BOUND if half else FLOAT32_BOUND
    for part, x in found.items():
        if not (x.error <= bound and x.cosine >= MIN_COSINE):
            raise ValueError(
                f"{teacher.options.key(option)}: {part} of the teacher is off by {x.error:.2g} of "
                f"its norm, with a cosine of {x.cosine:.4f}, on {NUM_IMAGES} images of the "
                f"training set; allowed are {bound} and {MIN_COSINE}. Set it to "
                f"{_off(option)!r}."
            )


@contextmanager
def _in_errors(options: TeacherOptions, option: str) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # of a compiler, or of an operator that lacks the precision
        raise ValueError(
            f"{options.key(option)}: the teacher does not run with it: {type(error).__name__}: "
            f"{error}. Set it to {_off(option)!r}."
        ) from error


def _off(option: str) -> Any:
    return TeacherOptions._field_defaults[option]
