"""A run, resolved once from its config and OUTPUT_DIR: its stages, and where it goes on."""

from dataclasses import dataclass
from typing import Callable, Optional, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.utils import comm

from .metrics import is_evaluated
from .preflight.check_config import check_config, check_teacher_is_kept
from .resume_point import ResumePoint
from .stages import Stage, scaled_to_processes, whole_run


@dataclass(frozen=True)
class RunPlan:
    """
    Everything that is decided before anything is built, identical in every process.

    `cfg`: of the whole run, for this number of processes; `seed`: of every random draw; `stages`:
    all of them, in turn; `resume_point`: where the run goes on, None of one that begins;
    `stages_left`: that are not finished, of a finished run the last, which is evaluated again.
    """

    cfg: CfgNode
    seed: int
    stages: Tuple[Stage, ...]
    stages_left: Tuple[Stage, ...]
    resume_point: Optional[ResumePoint] = None

    @classmethod
    def resolve(
        cls,
        cfg: CfgNode,
        resume: bool = False,
        on_checked: Optional[Callable[[], None]] = None,
    ) -> "RunPlan":
        """
        Check the config and find where the run goes on. Every process must call it.

        Args:
            resume: go on from the last checkpoint in OUTPUT_DIR, if there is one
            on_checked: called once the config has passed the check, before anything is written

        Raises:
            ValueError, FileNotFoundError: what is wrong with the config, or with the checkpoints
        """
        stages = check_config(cfg)
        if on_checked:
            on_checked()
        point = ResumePoint.find_together(cfg.OUTPUT_DIR) if resume else None
        if point is None:
            check_teacher_is_kept(stages)
        cfg = scaled_to_processes(cfg)
        if stages[0].is_whole_run:  # several stages refuse a config that would have to be scaled
            stages = [whole_run(cfg)]
        return cls(cfg, _seed(cfg, point), tuple(stages), _stages_left(cfg, stages, point), point)


def _seed(cfg: CfgNode, point: Optional[ResumePoint]) -> int:
    """SEED; where it is left to chance, that of the run to resume, or else a random one."""
    if cfg.SEED >= 0:
        return cfg.SEED
    return point.seed if point else comm.shared_random_seed()


def _stages_left(
    cfg: CfgNode, stages: Sequence[Stage], point: Optional[ResumePoint]
) -> Tuple[Stage, ...]:
    done = point.done if point else 0
    ended = [x for x in stages if x.end <= done]
    left = stages[len(ended) :]
    # The last checkpoint of a stage is saved before its evaluation, in which a run may be killed.
    if ended and ended[-1].end == done and cfg.DATASETS.TEST:
        if not is_evaluated(cfg.OUTPUT_DIR, done):  # Detectron2 logs it after the last iteration
            left = [ended[-1], *left]
    return tuple(left or stages[-1:])
