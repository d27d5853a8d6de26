"""What the teacher costs in a step, and what it would cost with other options, on this machine."""

import copy
import time
from contextlib import nullcontext
from dataclasses import replace
from statistics import median
from typing import Any, Dict, List

import torch
from tabulate import tabulate

from ...distiller import Distiller
from ...lesson import Lesson
from ...teacher import Teacher, TeacherOptions
from ...teacher.speed_up import with_options
from .teacher_answers import teacher_answers

ROUNDS = 3
# COMPILE takes minutes, and DEVICE depends on what else is there.
TRIED = {
    "FOLD_NORMS": TeacherOptions(fold_norms=True),
    "CHANNELS_LAST": TeacherOptions(channels_last=True),
    "FOLD_NORMS and CHANNELS_LAST": TeacherOptions(fold_norms=True, channels_last=True),
}
# Not on a CPU, where it is many times slower without instructions of its own.
TRIED_ON_GPUS = {"PRECISION bfloat16": TeacherOptions(precision="bfloat16")}


def plain_copy(teacher: Teacher) -> Teacher:
    """A copy of a teacher to which its options have not been applied yet, and will not be."""
    options = TeacherOptions(device=teacher.options.device)
    return replace(teacher, model=copy.deepcopy(teacher.model), options=options)


def teacher_savings(
    distiller: Distiller,
    lesson: Lesson,
    plain: Teacher,
    inputs: List[Dict[str, Any]],
    step_seconds: float,
    amp: bool,
) -> str:
    """
    Args:
        lesson: of the distiller
        plain: its teacher from :func:`plain_copy`
        inputs: a batch as of the data loader
        step_seconds: of a training step on such a batch
        amp: whether the student trains in mixed precision

    Returns:
        the teacher's share of the step, and a row for each option
    """
    device = next(plain.model.parameters()).device
    tried = {**TRIED, **(TRIED_ON_GPUS if device.type == "cuda" else {})}
    teachers = {"now": lesson.teacher}
    for name, options in tried.items():
        teachers[name] = with_options(plain, options._replace(device=plain.options.device))
    seconds: Dict[str, List[float]] = {name: [] for name in teachers}
    for _ in range(ROUNDS):
        for name, teacher in teachers.items():
            start = time.perf_counter()
            with torch.autocast("cuda") if amp else nullcontext():
                teacher_answers(distiller, lesson, inputs, teacher)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    now, *others = (median(x) for x in seconds.values())
    rows = [
        (name, f"{x:.3f} s", f"{(now - x) / step_seconds:+.0%} of the step saved")
        for name, x in zip(tried, others)
    ]
    return (
        f"The teacher takes {now:.3f} s of it, {now / step_seconds:.0%}. With these of "
        f"DISTILL.TEACHER alone:\n{tabulate(rows, tablefmt='plain')}"
    )
