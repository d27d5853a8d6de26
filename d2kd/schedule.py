"""Schedules for the weights of distillation losses."""

import math
from typing import Sequence, Tuple

from fvcore.common.param_scheduler import (
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
)

from detectron2.config import CfgNode

from .heads.registry import head_names
from .utils.checks import check_choice, check_range

DECAYS = ("none", "linear", "cosine")
ITERATION_KEYS = ("WARMUP_ITERS", "DECAY_FROM", "STOP_ITER")


def add_schedule_config(node: CfgNode) -> None:
    """
    Add the keys of a head's weight schedule, DISTILL.<NAME>.SCHEDULE.

    Iterations count from the start of the run, or of its stage where DISTILL.STAGES has several.
    SOLVER.REFERENCE_WORLD_SIZE changes them as it does SOLVER.MAX_ITER.
    """
    node.SCHEDULE = CfgNode()
    # iterations of linear warm-up from 0 to LOSS_WEIGHT; 0: none
    node.SCHEDULE.WARMUP_ITERS = 0
    # "none", "linear" or "cosine": from LOSS_WEIGHT at DECAY_FROM to END_FACTOR x LOSS_WEIGHT at
    # the stop
    node.SCHEDULE.DECAY = "none"
    node.SCHEDULE.DECAY_FROM = 0  # iteration
    node.SCHEDULE.END_FACTOR = 0.0  # in [0, 1]
    # iteration from which the loss is off and costs nothing; -1: never
    node.SCHEDULE.STOP_ITER = -1


class WeightSchedule:
    """The weight of a distillation loss, a function of the iteration only, so resuming is exact."""

    def __init__(
        self,
        *,
        weight: float,
        max_iter: int,
        warmup_iters: int = 0,
        decay: str = "none",
        decay_from: int = 0,
        end_factor: float = 0.0,
        stop_iter: int = -1,
    ):
        """
        Args:
            weight: loss weight without warm-up and decay
            max_iter: iterations of the run, or of its stage
            warmup_iters, decay, decay_from, end_factor, stop_iter: see add_schedule_config
        """
        self.weight = weight
        self.warmup_iters = warmup_iters
        self.decay_from = decay_from
        self.stop_iter = max_iter if stop_iter < 0 else stop_iter
        self.decay = {
            "none": ConstantParamScheduler(1.0),
            "linear": LinearParamScheduler(1.0, end_factor),
            "cosine": CosineParamScheduler(1.0, end_factor),
        }[decay]

    @classmethod
    def from_config(cls, name: str, cfg: CfgNode) -> "WeightSchedule":
        """
        Args:
            name: name of the head, as in DISTILL.HEADS

        Raises:
            ValueError: a value outside its range
        """
        node = cfg.DISTILL[name]
        _check(f"DISTILL.{name}", node, cfg.SOLVER.MAX_ITER)
        keys = {k.lower(): v for k, v in node.SCHEDULE.items()}
        return cls(weight=node.LOSS_WEIGHT, max_iter=cfg.SOLVER.MAX_ITER, **keys)

    def __call__(self, iteration: int) -> float:
        """
        Args:
            iteration: from 0, the start of the run or stage

        Returns:
            the weight in this iteration; 0 from the stop on
        """
        if iteration >= self.stop_iter:
            return 0.0
        warmup = min(1.0, (iteration + 1) / self.warmup_iters) if self.warmup_iters else 1.0
        span = max(self.stop_iter - self.decay_from, 1)
        where = min(max(iteration - self.decay_from, 0) / span, 1.0)
        return self.weight * warmup * self.decay(where)


def scale_schedules(cfg: CfgNode, factor: float) -> None:
    """
    Multiply the iterations of all schedules, those in the OPTS of DISTILL.TEACHERS too, in place.

    Args:
        cfg: not frozen
        factor: by which SOLVER.MAX_ITER was multiplied
    """
    for name in head_names():
        schedule = cfg.DISTILL[name].SCHEDULE
        schedule.update({k: _scaled(schedule[k], factor) for k in ITERATION_KEYS})
    ends = tuple(f".SCHEDULE.{k}" for k in ITERATION_KEYS)
    for entry in cfg.DISTILL.TEACHERS:
        opts = entry["OPTS"] = list(entry.get("OPTS", []))
        for i, key in enumerate(opts[0::2]):
            if str(key).endswith(ends):
                opts[2 * i + 1] = _scaled(int(opts[2 * i + 1]), factor)


def _scaled(iterations: int, factor: float) -> int:
    # 0 and -1 mean none and never, at any length.
    return max(round(iterations * factor), 1) if iterations > 0 else iterations


def _check(key: str, node: CfgNode, max_iter: int) -> None:
    schedule = node.SCHEDULE
    if not 0 < node.LOSS_WEIGHT < math.inf:
        raise ValueError(
            f"{key}.LOSS_WEIGHT must be above 0, got {node.LOSS_WEIGHT}; it must also be finite. "
            "To switch a head off, remove it from DISTILL.HEADS."
        )
    why = "0 means as published, else a number of pixels, such as 1075200 for 800x1344"
    check_range(f"{key}.REFERENCE_PIXELS", node.get("REFERENCE_PIXELS", 0), 0, 10**9, why)
    check_choice(f"{key}.SCHEDULE.DECAY", schedule.DECAY, DECAYS)
    why = "it is the fraction of LOSS_WEIGHT at the end of the decay"
    check_range(f"{key}.SCHEDULE.END_FACTOR", schedule.END_FACTOR, 0, 1, why)
    for name in ("WARMUP_ITERS", "DECAY_FROM"):
        why = f"SOLVER.MAX_ITER is {max_iter}"
        check_range(f"{key}.SCHEDULE.{name}", schedule[name], 0, max_iter, why)
    if schedule.DECAY != "none" and 0 < schedule.STOP_ITER <= schedule.DECAY_FROM:
        raise ValueError(
            f"{key}.SCHEDULE.DECAY is {schedule.DECAY!r} from iteration DECAY_FROM "
            f"{schedule.DECAY_FROM} on, but the head is off from STOP_ITER {schedule.STOP_ITER} on."
        )
    if schedule.STOP_ITER == 0 or schedule.STOP_ITER < -1:
        raise ValueError(
            f"{key}.SCHEDULE.STOP_ITER must be -1 (never) or a positive iteration, got "
            f"{schedule.STOP_ITER}."
        )


def pixel_factor(reference_pixels: int, image_sizes: Sequence[Tuple[int, int]]) -> float:
    """
    Factor that makes the weight of a sum over cells independent of the image size.

    Such a loss grows with the image, so its weight fits one image size only; published weights are
    for 800x1344. With REFERENCE_PIXELS N a weight has the same effect at every size as at N pixels:
    with 1075200 the published weights are right for any size.

    Args:
        reference_pixels: N; 0: as published, no factor
        image_sizes: (height, width) of each image, without padding

    Returns:
        factor of the loss, N / mean number of pixels per image
    """
    if not reference_pixels:
        return 1.0
    pixels = sum(height * width for height, width in image_sizes) / len(image_sizes)
    return reference_pixels / pixels
