"""
Look at a distillation before it is run: d2kd doctor --config-file run.yaml

Builds student, teacher and heads, takes a few steps on two images of noise, and prints what was
built, which heads fit this pair and why the others do not, what each loss does, what a run will
cost, and what the teacher would with other options; at last, whether every head has an effect, and
the data sets are there.
Nothing is written. Whether the teacher detects anything in this data is for the run to find out.
"""

import argparse
import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from tabulate import tabulate

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from .checkpoint import PlainCheckpointer
from .cli.common import add_config_options, command_parser, read_config
from .config import student_config
from .config.lessons import lesson_configs
from .data import register_datasets
from .data.class_lists import check_num_classes
from .data.class_names import coco_json_files, names_in_sets
from .data.noise import noise_batch
from .data.unlabelled import batch_sizes, find_unlabelled
from .distiller import Distiller
from .engine.initialise import initialise
from .engine.monitor.finite import FiniteAMPTrainer, FiniteSimpleTrainer
from .engine.monitor.head_check import HeadCheck
from .engine.monitor.head_parameters import HeadParameters
from .engine.monitor.liveness import has_boxes
from .engine.monitor.loss_gradients import LossGradients, describe, loss_scale, suggest
from .engine.optimizer import build_optimizer
from .engine.preflight.check_config import check_config, check_teacher_is_kept
from .engine.preflight.summary import summary
from .engine.preflight.teacher_savings import plain_copy, teacher_savings
from .heads.fit import misfit
from .heads.registry import head_names
from .pairing.pair import DistillPair
from .teacher.speed_up import speed_up
from .utils.command_line import count, parse_command_line
from .utils.distils import distils
from .utils.user_mistakes import run_command

MEASURED = (0, 3)  # steps on noise in which the losses' gradients are; those between are timed
STEPS = MEASURED[-1] + 1
EPILOG = """
Exit code 0: it can be run, if the teacher has DISTILL.TEACHER.MIN_AP on the test set, which a run
looks at before its first step; 2: it cannot, and the last line says why.

Examples:
  d2kd doctor --config-file configs/quickstart/pkd.yaml
  d2kd doctor --config-file run.yaml --plugin my_head.py SOLVER.IMS_PER_BATCH 8
"""


@dataclass
class Cost:
    """`seconds` of a step and `peak_mib` of memory, with `images` images of `size` pixels."""

    seconds: float
    peak_mib: float
    images: int
    size: Sequence[int]


def main(argv: Optional[Sequence[str]] = None) -> int:
    return run_command("d2kd doctor", diagnose, argv)


def diagnose(argv: Optional[Sequence[str]] = None) -> None:
    """
    Raises:
        ValueError, OSError: why the run that a command line names would not work
    """
    args = parse_args(argv)
    cfg = read_config(args)
    stages = check_config(cfg)
    check_teacher_is_kept(stages)
    if not distils(cfg):
        print("A student alone: there is no distillation to look at.")
        stages = []
    for stage in stages:
        if not stage.is_whole_run:
            print(f"\n{stage}")
        try:
            with stage.in_errors():
                examine(stage.cfg, args.images)
        except ValueError:
            check_count_of_classes(cfg)  # a head would blame the teacher's classes
            raise
    check_data(cfg)  # last: there is much to see without it
    print("\nIt can be run.")


def check_count_of_classes(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: the first training set has other than the student's number of classes
    """
    student, first = student_config(cfg), cfg.DATASETS.TRAIN[:1]
    names = names_in_sets(first, coco_json_files(cfg))
    if names:
        check_num_classes(student, student.MODEL.META_ARCHITECTURE, first[0], names, is_test=False)


def check_data(cfg: CfgNode) -> None:
    """
    As a run does, but without drawing the built-in set.

    Raises:
        ValueError, OSError: a data set is not known, or its files are not there or not sound
    """
    student = student_config(cfg).MODEL.META_ARCHITECTURE
    register_datasets(cfg, student, draw=False)
    find_unlabelled(cfg)


def examine(cfg: CfgNode, num_images: int) -> None:
    """
    Build and try out one stage, and print what was found.

    Raises:
        ValueError, OSError: what is wrong with the config, or a loss that is not finite
    """
    torch.manual_seed(0)
    distiller = build_model(cfg).train()
    initialise(distiller, PlainCheckpointer(distiller), cfg.MODEL.WEIGHTS)
    print("\n" + summary(distiller))
    plain = []
    for lesson, own in zip(distiller.lessons, lesson_configs(cfg)):
        of = f"with {lesson.name}" if lesson.name else "for this pair"
        print(f"\nHeads {of}:\n" + _fits(own.cfg, lesson.pair))
        plain.append(plain_copy(lesson.teacher))
        for option in lesson.teacher.options.steps:
            speed_up(lesson.teacher, option)
    found, errors, cost = try_out(cfg, distiller, num_images)
    print("\nLosses on noise, in the first step:\n" + describe(found))
    print(suggest(found, distiller.schedules, 0, cfg.DISTILL.LIVENESS.WANTED_SHARE))
    print("\n" + _estimate(cfg, cost))
    batch = noise_batch(cost.images, *cost.size, 4, distiller.pair.student.num_classes)
    amp = cfg.SOLVER.AMP.ENABLED
    for lesson, teacher in zip(distiller.lessons, plain):
        saved = teacher_savings(distiller, lesson, teacher, batch, cost.seconds, amp)
        print("\n" + (f"{lesson.name}: {saved}" if lesson.name else saved))
    if errors and cfg.DISTILL.LIVENESS.ENABLED:
        raise ValueError(
            f"On images of noise: {' '.join(errors)} A run looks at this in its first "
            f"{cfg.DISTILL.LIVENESS.FIRST_STEPS} steps and stops if it finds the same."
        )


def try_out(
    cfg: CfgNode, distiller: Distiller, num_images: int
) -> Tuple[LossGradients, List[str], Cost]:
    """
    Returns:
        gradients of the losses in the first step, what is wrong with heads by the check of a run's
        first steps, and the cost of a step
    """
    device, classes = torch.device(cfg.MODEL.DEVICE), distiller.pair.student.num_classes
    height = cfg.INPUT.MIN_SIZE_TRAIN[0] or 320  # 0: images stay as they are
    size = height, min(4 * height // 3, cfg.INPUT.MAX_SIZE_TRAIN)
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0
    batches = [noise_batch(num_images, *size, 4, classes, keypoints) for _ in range(STEPS)]
    count = _count_unlabelled(cfg, num_images)
    for batch in batches:
        for image in batch[:count]:
            del image["instances"]
    optimizer = build_optimizer(cfg, distiller)
    kind = FiniteAMPTrainer if cfg.SOLVER.AMP.ENABLED else FiniteSimpleTrainer
    trainer = kind(distiller, batches, optimizer)
    parameters = HeadParameters(distiller.heads, optimizer)
    parameters.snapshot()
    checks = {k: HeadCheck(k, x, parameters, len(MEASURED)) for k, x in distiller.heads.items()}
    found: List[LossGradients] = []

    def look(module: Distiller, inputs: Any, losses: Dict[str, torch.Tensor]) -> None:
        if trainer.iter in MEASURED:
            found.append(LossGradients.measure(losses, module.last_step, loss_scale(trainer)))

    distiller.register_forward_hook(look)
    seconds: List[float] = []
    with EventStorage():
        for trainer.iter in range(STEPS):
            start, scale = time.perf_counter(), loss_scale(trainer)
            with _told_by_weights(cfg, trainer.iter):
                trainer.run_step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if trainer.iter not in MEASURED:
                seconds.append(time.perf_counter() - start)
                continue
            skipped = loss_scale(trainer) < scale  # mixed precision's first guess was too large
            for name in found[-1].heads:
                if has_boxes(distiller, name) and not skipped:
                    checks[name].add(found[-1], is_main=True)
    errors = [x.error() for x in checks.values() if x.is_done]
    cost = Cost(min(seconds), _peak_mib(device), num_images, size)
    return found[0], list(filter(None, errors)), cost


def _count_unlabelled(cfg: CfgNode, num_images: int) -> int:
    """Of a few images as many as in proportion, and some of both kinds where a batch has both."""
    labelled, unlabelled = batch_sizes(cfg)
    if not (labelled and unlabelled):
        return num_images if unlabelled else 0
    if num_images < 2:
        raise ValueError(
            f"--images {num_images}: a batch has labelled and unlabelled images "
            "(DISTILL.UNLABELLED): take 2 or more."
        )
    share = unlabelled / (labelled + unlabelled)
    return min(max(round(share * num_images), 1), num_images - 1)


@contextmanager
def _told_by_weights(cfg: CfgNode, step: int) -> Iterator[None]:
    """Let what a loss too large has led to, also inside a detector, name the weights."""
    try:
        yield
    except FloatingPointError as error:
        weights = {
            f"DISTILL.{x}.LOSS_WEIGHT": own.cfg.DISTILL[x].LOSS_WEIGHT
            for own in lesson_configs(cfg)
            for x in own.cfg.DISTILL.HEADS
        }
        raise ValueError(
            f"Step {step + 1} on images of noise: {error} Too large for it may be SOLVER.BASE_LR "
            f"{cfg.SOLVER.BASE_LR}, or of the heads {weights} and what else weighs their terms."
        ) from error


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _fits(cfg: CfgNode, pair: DistillPair) -> str:
    rows = []
    for name in head_names():
        reason = misfit(name, cfg, pair)
        used = "used" if name in cfg.DISTILL.HEADS else "fits"
        rows.append((name, used if reason is None else "no", reason or ""))
    return tabulate(rows, maxcolwidths=[None, None, 80], tablefmt="plain")


def _estimate(cfg: CfgNode, cost: Cost) -> str:
    batch, iterations = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER
    step = cost.seconds * batch / cost.images
    height, width = cost.size
    return (
        f"{cost.seconds:.2f} s a step of {cost.images} images of {height}x{width} on "
        f"{cfg.MODEL.DEVICE}, at most {cost.peak_mib:.0f} MiB. In proportion, {step:.2f} s for a "
        f"batch of {batch} in one process, and {timedelta(seconds=round(step * iterations))} for "
        f"{iterations} iterations, without reading images and evaluating."
    )


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("d2kd doctor", __doc__, EPILOG)
    add_config_options(parser)
    parser.add_argument("--images", type=count, default=2, help="in a step; default %(default)s")
    return parse_command_line(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
