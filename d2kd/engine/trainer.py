"""Detectron2's DefaultTrainer, with what distillation and exact resume need."""

import logging
import os
import weakref
from typing import Any, Dict, List, Optional, Union

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, PeriodicCheckpointer, TrainerBase, default_writers
from detectron2.engine.hooks import EvalHook, LRScheduler
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..checkpoint import PlainCheckpointer, unwrap
from ..data import ResumableLoader, build_train_loader, class_names
from ..data.loader import MixedLoader
from ..data.mapper import CheckedMapper
from ..data.unlabelled import batch_sizes
from ..distiller import Distiller
from ..utils.atomic_file import explain_full_disk
from .evaluator import best_metric, build_evaluator
from .facts import write_fact
from .hooks import (
    BestCheckpointer,
    KeepLossNormalizer,
    MakeUpEvaluation,
    SeedEachIteration,
    seed_everything,
)
from .initialise import initialise
from .monitor.finite import FiniteAMPTrainer, FiniteSimpleTrainer
from .monitor.liveness import Liveness
from .monitor.show_panel import ShowPanel
from .optimizer import build_optimizer, parameter_names, placed_state, schedule_in_errors
from .parallel import data_parallel
from .preflight.summary import summary, summary_facts
from .preflight.teacher_options import apply_options
from .resume import RunRecord
from .resume_point import ResumePoint
from .stages import LogStage, Stage, move_to, only_stage, scaled_to_processes

logger = logging.getLogger(__name__)

# Hooks whose state outlives a stage: the student's and the run's, not the teacher's or the heads'.
KEPT_HOOKS = ("KeepLossNormalizer", "BestCheckpointer")


class Trainer(DefaultTrainer):
    """
    Trains a Distiller or a plain detector from a config: a whole run, or one stage of it.

    Data order, augmentation and every random draw of iteration i are functions of (seed, i, rank),
    so a resumed run goes on exactly as if it had not been interrupted, and a student trained alone
    sees the batches of the distilled one.
    """

    def __init__(
        self, cfg: CfgNode, stage: Optional[Stage] = None, seed: Optional[int] = None
    ) -> None:
        """
        Args:
            cfg: of the run
            stage: which part of the run; None: all of it
            seed: of the run; None: SEED, and a random one where that is below 0
        """
        # Instead of DefaultTrainer's, which wraps models for CUDA only and checkpoints the wrapper.
        TrainerBase.__init__(self)
        if stage is None:
            stage = only_stage(scaled_to_processes(cfg))
        self.stage = stage
        self.cfg = cfg = stage.cfg
        if seed is None:
            seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.seed = seed
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)  # 0.5's writers want it to be there
        seed_everything(self.seed)
        model = self.build_model(cfg)
        if getattr(model, "lessons", ()):
            logger.info(summary(model))
            for facts in summary_facts(cfg, model):
                write_fact(cfg.OUTPUT_DIR, "distillation", stage=stage.index, **facts)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        inner = FiniteAMPTrainer if cfg.SOLVER.AMP.ENABLED else FiniteSimpleTrainer
        has_labels = batch_sizes(cfg)[0] > 0  # without, what only the own losses read is not used
        self._trainer = inner(data_parallel(model, has_labels), data_loader, optimizer)
        lr_cfg, self.lr_start = self.stage.learning_rate
        with schedule_in_errors(lr_cfg):
            self.scheduler = self.build_lr_scheduler(lr_cfg, optimizer)
        if self.lr_start:
            move_to(self.scheduler, self.lr_start)
        self.record = RunRecord(self.stage.run, self.seed, data_loader.images)
        write_fact(cfg.OUTPUT_DIR, "environment", **self.record.environment)
        self.checkpointer = PlainCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter = self.stage.start, self.stage.end
        if not self.stage.is_whole_run:
            model.start_iter = self.stage.start  # the Distiller's schedules count from there
        self.register_hooks(self.build_hooks())

    def train(self) -> Any:
        # TorchScript's focal loss rounds otherwise in the first iteration of a process, where it is
        # not optimised yet: a resumed run would differ. GPUs are not exact to the bit anyway.
        exact = torch.jit.optimized_execution(self.cfg.MODEL.DEVICE != "cpu")
        with exact, explain_full_disk(self.cfg.OUTPUT_DIR):
            return super().train()

    def after_train(self) -> None:
        self.iter = min(self.iter, self.max_iter)  # one more where there was no step left to do
        if self.iter < self.max_iter:
            # EvalHook takes a run that stops in its last iteration for one that is finished.
            self._hooks = [x for x in self._hooks if not isinstance(x, EvalHook)]
        try:
            super().after_train()
        except Exception:
            if self.iter >= self.max_iter:
                raise
            # Raising it would hide why the run stopped, as on a full disk, where logging fails too.
            logger.exception("Also, after the run had stopped:")

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    def build_train_loader(self, cfg: CfgNode) -> Union[ResumableLoader, MixedLoader]:
        return build_train_loader(cfg, self.seed)

    def build_hooks(self) -> List[Optional[Any]]:
        student = getattr(self._module, "student", self._module)
        keep = KeepLossNormalizer(student, self.cfg.SOLVER.CHECKPOINT_PERIOD)
        # Before the evaluation, which leaves nothing of the step to draw.
        show = ShowPanel(self._module, self.cfg.VIS_PERIOD, class_names(self.cfg))
        is_watched = self.distiller and self.cfg.DISTILL.LIVENESS.ENABLED
        watch = [Liveness(self.distiller, self.optimizer, self.cfg)] if is_watched else []
        hooks = [SeedEachIteration(self.seed), keep, show, *watch, *super().build_hooks()]
        for hook in hooks:
            if isinstance(hook, PeriodicCheckpointer):
                hook.file_prefix = self.stage.file_prefix
        if self.stage.count > 1:
            hooks.insert(0, LogStage(self.stage.index))
        if self.cfg.TEST.BEST_METRIC and self.cfg.DATASETS.TEST and comm.is_main_process():
            period, sets = self.cfg.TEST.EVAL_PERIOD, self.cfg.DATASETS.TEST
            best = BestCheckpointer(period, self.checkpointer, best_metric(self.cfg), sets)
            hooks.insert(-1, best)  # after the evaluation; the writers stay last
        evaluating = [x for x in hooks if isinstance(x, (EvalHook, BestCheckpointer))]
        return [*hooks, MakeUpEvaluation(evaluating, self.cfg.OUTPUT_DIR)]

    def build_writers(self) -> List[Any]:
        # The time that is left is the run's, not the stage's.
        return default_writers(self.cfg.OUTPUT_DIR, self.stage.run.SOLVER.MAX_ITER)

    def resume_or_load(self, resume: bool = True) -> None:
        """
        Go on from the last checkpoint in OUTPUT_DIR; without one, or with resume False, start from
        MODEL.WEIGHTS and what DISTILL.INHERIT takes from the teacher.

        Raises:
            ValueError: a checkpoint that is none, or is of another student, teacher or set of heads
        """
        self.start_from(ResumePoint.find(self.cfg.OUTPUT_DIR) if resume else None)

    def start_from(self, point: Optional[ResumePoint]) -> None:
        """
        Prepare for :meth:`train`.

        Args:
            point: None: start from MODEL.WEIGHTS and DISTILL.INHERIT; at the end of the stage
                before: take over its student; else: resume within this stage

        Raises:
            ValueError: a checkpoint that is none, or is of another student, teacher or set of heads
        """
        if point is None:
            initialise(self._module, self.checkpointer, self.cfg.MODEL.WEIGHTS)
        elif 0 < self.stage.start == point.done:
            self.begin_stage(point.path)
        else:
            self._resume(point.path)
        if self.distiller:  # after DISTILL.INHERIT, which copies its weights as they were loaded
            with self.stage.in_errors():
                apply_options(self.cfg, self.distiller)

    def _resume(self, path: str) -> None:
        self.checkpointer.load(path)
        self.start_iter = self.data_loader.start_iter = self.iter + 1
        logger.info(f"Resuming at iteration {self.start_iter}.")
        final = os.path.basename(self.stage.final_checkpoint)
        if self.start_iter == self.max_iter and os.path.basename(path) != final:
            # It was killed between its last two saves; there is no step that would make this.
            self.checkpointer.save(final[: -len(".pth")], iteration=self.iter)

    def begin_stage(self, path: str) -> None:
        """
        Take over the student from the last checkpoint of the stage before; heads, optimizer and
        learning rate start anew.

        Raises:
            ValueError: a checkpoint that is none, or is of another student
        """
        state = self.checkpointer.load(path, checkpointables=[])["trainer"]
        self.record.compare(state)
        self._check_student()
        kept = {k: v for k, v in state["hooks"].items() if k in KEPT_HOOKS}
        TrainerBase.load_state_dict(self, {**state, "hooks": kept})
        self.start_iter = self.data_loader.start_iter = self.iter + 1
        self._module.inherit_from_teacher()

    def state_dict(self) -> Dict[str, Any]:
        # Detectron2 0.5 leaves the inner trainer, and with it the optimizer, out of its state.
        state = TrainerBase.state_dict(self)
        state["_trainer"] = self._trainer.state_dict()
        state["seed"] = self.seed  # which ResumePoint reads, where SEED is left to chance
        state["heads"] = self._head_names
        state["stage_start"] = self.stage.start
        state["parameters"] = parameter_names(self.optimizer, self._module)
        return {**state, **self.record.state_dict()}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        if state.get("heads", []) != self._head_names:
            raise ValueError(
                f"The checkpoint is of a run with DISTILL.HEADS {state.get('heads', [])}, this one "
                f"has {self._head_names}. Give it an OUTPUT_DIR of its own."
            )
        stage_start = state.get("stage_start", 0)
        if stage_start != self.stage.start:
            raise ValueError(
                f"The checkpoint is of a stage that began at iteration {stage_start}; by "
                f"DISTILL.STAGES it begins at {self.stage.start}. Give this run an OUTPUT_DIR of "
                "its own."
            )
        self.record.compare(state)
        self._check_student()
        done = state["iteration"] + 1
        if done > self.max_iter:
            raise ValueError(
                f"SOLVER.MAX_ITER is {self.max_iter}, but the checkpoint has {done} iterations "
                "behind it. Set it to as many or more, or start a run in an OUTPUT_DIR of its own."
            )
        # Without the scheduler's state, which has the old learning rates.
        hooks = {k: v for k, v in state["hooks"].items() if k != LRScheduler.__qualname__}
        TrainerBase.load_state_dict(self, {**state, "hooks": hooks})
        names = parameter_names(self.optimizer, self._module)
        old = state["_trainer"]
        optimizer = placed_state(self.optimizer, names, old["optimizer"], state.get("parameters"))
        # State that only an AMP run has starts anew.
        new = self._trainer.state_dict()
        self._trainer.load_state_dict({**new, **old, "optimizer": optimizer})
        move_to(self.scheduler, self.lr_start + done - self.stage.start)

    def _check_student(self) -> None:
        # Right after loading: the optimizer's error would not name the cause.
        wrong = self.checkpointer.missing_keys + self.checkpointer.unexpected_keys
        if wrong:
            raise ValueError(
                f"The checkpoint is of a run with another student: {wrong[0]!r} is not in both, or "
                "of another shape. Give this one an OUTPUT_DIR of its own."
            )

    @property
    def _module(self) -> nn.Module:
        return unwrap(self._trainer.model)

    @property
    def distiller(self) -> Optional[Distiller]:
        """The model, where it has a teacher."""
        return self._module if getattr(self._module, "lessons", ()) else None

    @property
    def _head_names(self) -> List[str]:
        return list(getattr(self._module, "heads", []))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        mapper = CheckedMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None
    ) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name, output_folder)
