"""DISTILL.STAGES: one run as several stages, each with a teacher and heads of its own."""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ContextManager, List, Tuple

from torch.optim.lr_scheduler import LRScheduler

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.utils import comm

from ..schedule import scale_schedules
from ..utils.distils import distils
from .stage_config import read_stage, stage_config, stage_in_errors

STAGE_LR = ("restart", "continue")


@dataclass(frozen=True)
class Stage:
    """
    The part of a run that has one teacher and one set of heads.

    `index`: from 1, of `count`; `start`, `end`: its iterations of the run, end not included; `cfg`:
    the config of this stage, whose SOLVER.MAX_ITER is end - start; `run`: that of the whole run.
    """

    index: int
    count: int
    start: int
    end: int
    cfg: CfgNode
    run: CfgNode

    @property
    def is_whole_run(self) -> bool:
        """The run has no DISTILL.STAGES."""
        return self.cfg is self.run

    @property
    def name(self) -> str:
        """ "stage_1" and so on, in logs and names of files; "" where the run has none."""
        return "" if self.is_whole_run else f"stage_{self.index}"

    @property
    def file_prefix(self) -> str:
        """Prefix of its checkpoints; model_final.pth is the end of the run, never of a stage."""
        return "model" if self.index == self.count else f"model_stage_{self.index}"

    @property
    def final_checkpoint(self) -> str:
        """Path of the checkpoint that its last iteration saves."""
        return os.path.join(self.cfg.OUTPUT_DIR, f"{self.file_prefix}_final.pth")

    @property
    def learning_rate(self) -> Tuple[CfgNode, int]:
        """The config whose SOLVER gives the schedule, and the iteration of it to start at."""
        if self.run.DISTILL.STAGE_LR == "continue":
            return self.run, self.start
        return self.cfg, 0

    def in_errors(self) -> ContextManager[None]:
        """Prefix errors with the stage, where the run has stages."""
        return nullcontext() if self.is_whole_run else stage_in_errors(self.index)

    def __str__(self) -> str:
        teacher, heads = self.cfg.DISTILL.TEACHER, list(self.cfg.DISTILL.HEADS)
        return (
            f"Stage {self.index} of {self.count}: iterations {self.start} to {self.end - 1}, "
            f"teacher {teacher.CONFIG_FILE or teacher.BACKBONE}, heads {heads}"
        )


class LogStage(HookBase):
    """Write the stage's number beside the losses, for TensorBoard and metrics.json."""

    def __init__(self, index: int):
        self.index = index

    def after_step(self) -> None:
        self.trainer.storage.put_scalar("stage", self.index, smoothing_hint=False)


def whole_run(cfg: CfgNode) -> Stage:
    """The single stage of a run without DISTILL.STAGES."""
    return Stage(1, 1, 0, cfg.SOLVER.MAX_ITER, cfg, cfg)


def scaled_to_processes(cfg: CfgNode) -> CfgNode:
    """
    A run's config for this number of processes, if SOLVER.REFERENCE_WORLD_SIZE is of another one:
    what Detectron2 scales, and the schedules of heads, which would else end elsewhere in the run.
    """
    scaled = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
    if scaled is not cfg:
        is_frozen = scaled.is_frozen()
        scaled.defrost()
        scale_schedules(scaled, cfg.SOLVER.REFERENCE_WORLD_SIZE / comm.get_world_size())
        if is_frozen:
            scaled.freeze()
    return scaled


def plan_stages(cfg: CfgNode) -> List[Stage]:
    """
    Returns:
        the stages of DISTILL.STAGES in turn; where there are none, or the student is trained
        alone, one that is the whole run

    Raises:
        ValueError: a stage that is not sound, or iterations that do not add up
    """
    if not (distils(cfg) and cfg.DISTILL.STAGES):
        return [whole_run(cfg)]
    _check_run(cfg)
    nodes, stages, start = [], [], 0
    for index in range(1, len(cfg.DISTILL.STAGES) + 1):
        with stage_in_errors(index):
            nodes.append(read_stage(cfg, index))
    iterations = [node.ITERATIONS for node in nodes]
    if sum(iterations) != cfg.SOLVER.MAX_ITER:
        raise ValueError(
            f"DISTILL.STAGES: ITERATIONS {iterations} add up to {sum(iterations)}, but "
            f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}. Make them agree."
        )
    for index, node in enumerate(nodes, start=1):
        with stage_in_errors(index):
            own = stage_config(cfg, node)
        if index < len(nodes):
            own.TEST.EXPECTED_RESULTS = []  # those of the run's end
        stages.append(Stage(index, len(nodes), start, start + node.ITERATIONS, own, cfg))
        start += node.ITERATIONS
    return stages


def only_stage(cfg: CfgNode) -> Stage:
    """
    Raises:
        ValueError: the run has several
    """
    stages = plan_stages(cfg)
    if len(stages) > 1:
        raise ValueError(
            f"DISTILL.STAGES has {len(stages)} stages, and a Trainer is for one of them; "
            "d2kd.engine.train runs them all."
        )
    return stages[0]


def move_to(scheduler: LRScheduler, iteration: int) -> None:
    """Set one of Detectron2's learning-rate schedules to an iteration."""
    # Not by its step(): PyTorch would warn that the optimizer has not made one yet.
    scheduler.last_epoch = iteration
    for group, learning_rate in zip(scheduler.optimizer.param_groups, scheduler.get_lr()):
        group["lr"] = learning_rate


def _check_run(cfg: CfgNode) -> None:
    if cfg.DISTILL.TEACHERS:
        raise ValueError(
            "DISTILL.TEACHERS and DISTILL.STAGES are both set: teachers come at once or one after "
            "the other. Set one of them to []."
        )
    if cfg.SOLVER.REFERENCE_WORLD_SIZE not in (0, comm.get_world_size()):
        raise ValueError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {cfg.SOLVER.REFERENCE_WORLD_SIZE}: Detectron2 would "
            "change SOLVER.MAX_ITER, and DISTILL.STAGES no longer add up to it. Set it to 0."
        )
