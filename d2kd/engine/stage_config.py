"""One entry of DISTILL.STAGES: how it is read, and the config of the run during that stage."""

import math
from typing import ContextManager, Tuple

from detectron2.config import CfgNode

from ..config import merge_opts
from ..config.lessons import is_of_heads, prefixed, read_entry, with_entry
from ..config.unread import refuse_unread
from ..utils.checks import check_range

# Keys of SOLVER that a stage may change: the learning rate. Others would move the run's iterations
# or the order of its data.
LR_KEYS = (
    "BASE_LR",
    "BASE_LR_END",
    "BIAS_LR_FACTOR",
    "GAMMA",
    "LR_SCHEDULER_NAME",
    "NUM_DECAYS",
    "RESCALE_INTERVAL",
    "STEPS",
    "WARMUP_FACTOR",
    "WARMUP_ITERS",
    "WARMUP_METHOD",
)


def stage_in_errors(index: int) -> ContextManager[None]:
    """Prefix ValueError and FileNotFoundError with the stage, whose index counts from 1."""
    return prefixed(f"DISTILL.STAGES[{index - 1}]")


def read_stage(cfg: CfgNode, index: int) -> CfgNode:
    """
    Args:
        index: of the stage, from 1

    Returns:
        ITERATIONS, TEACHER, HEADS, INHERIT and OPTS: the stage's own, or else the run's

    Raises:
        ValueError: a key that nobody reads, or a value of the wrong type
    """
    entry = cfg.DISTILL.STAGES[index - 1]
    node = read_entry(cfg, entry, {"ITERATIONS": 0}, is_first=index == 1)
    check_range("ITERATIONS", node.ITERATIONS, 1, math.inf)
    return node


def stage_config(cfg: CfgNode, node: CfgNode) -> CfgNode:
    """
    The run's config with what a stage changes, SOLVER.MAX_ITER being the stage's iterations.

    Args:
        node: from read_stage

    Raises:
        ValueError: OPTS that a stage may not change, or a learning rate that does not fit into it
    """
    restart = cfg.DISTILL.STAGE_LR == "restart"
    stage = with_entry(cfg, node)
    stage.SOLVER.MAX_ITER = node.ITERATIONS
    merge_opts(stage, node.OPTS, "OPTS")
    for key in node.OPTS[0::2]:
        _check_may_change(key, restart)
    refuse_unread(stage, node.OPTS, "OPTS")
    if restart:
        if "SOLVER.STEPS" not in node.OPTS[0::2]:
            stage.SOLVER.STEPS = _scaled_steps(cfg, node.ITERATIONS)
        if stage.SOLVER.WARMUP_ITERS > node.ITERATIONS:
            raise ValueError(
                f"SOLVER.WARMUP_ITERS {stage.SOLVER.WARMUP_ITERS} is more than the stage's "
                f"{node.ITERATIONS} iterations: its learning rate would never be reached. Set it "
                'in the stage\'s OPTS, or DISTILL.STAGE_LR to "continue".'
            )
    return stage


def _check_may_change(key: str, restart: bool) -> None:
    if is_of_heads(key):
        return
    if key not in [f"SOLVER.{x}" for x in LR_KEYS]:
        raise ValueError(
            f"OPTS has {key}. A stage may change DISTILL.<HEAD>.*, DISTILL.REGIONS.*, "
            "DISTILL.LEVELS, DISTILL.ADAPT_EQUAL_CHANNELS and, in SOLVER, "
            f"{', '.join(LR_KEYS)}."
        )
    if not restart:
        raise ValueError(
            f'OPTS has {key}, but DISTILL.STAGE_LR "continue" has one learning-rate schedule for '
            'the whole run. Set that to "restart", or take the key out.'
        )


def _scaled_steps(cfg: CfgNode, iterations: int) -> Tuple[int, ...]:
    """SOLVER.STEPS at the same fractions of a stage as of the run."""
    total = cfg.SOLVER.MAX_ITER
    # Detectron2 leaves out steps after the end.
    steps = tuple(x * iterations // total for x in cfg.SOLVER.STEPS if x < total)
    if 0 in steps or len(set(steps)) < len(steps):
        raise ValueError(
            f"SOLVER.STEPS {tuple(cfg.SOLVER.STEPS)} of {total} iterations become {steps} of "
            f"{iterations}. Set SOLVER.STEPS in the stage's OPTS."
        )
    return steps
