"""Hooks that Detectron2 lacks, or has only in its newest version."""

import logging
import math
import os
import random
import time
from typing import Any, Dict, List, Sequence

import numpy as np
import torch
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm

from ..utils.sha256 import sha256_of
from ..weights.run_checkpoints import BEST
from ..weights.verify import read_verified
from .metrics import is_evaluated

logger = logging.getLogger(__name__)


def seed_everything(*entropy: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices) by a mixture of the given numbers."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class SeedEachIteration(HookBase):
    """
    Make every random draw of an iteration a function of (seed, iteration, rank).

    A resumed run then needs no saved random state to draw the same proposals and masks, and a
    student alone draws the same proposals as a distilled one, whatever the heads draw.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def before_step(self) -> None:
        seed_everything(self.seed, self.trainer.iter, comm.get_rank())


class KeepLossNormalizer(HookBase):
    """
    Save the running mean by which RetinaNet and FCOS divide their losses; Detectron2 forgets it.

    Without it a resumed run would start with other losses. Every process has a mean of its own,
    so this hook runs on all of them, before the one that saves.
    """

    def __init__(self, detector: nn.Module, period: int):
        """
        Args:
            detector: the student; nothing is done for one without such a mean
            period: iterations between checkpoints
        """
        self.detector = detector
        self.period = period
        self.values: List[float] = []  # one per process

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        if next_iter % self.period == 0 or next_iter >= self.trainer.max_iter:
            value = getattr(self.detector, "loss_normalizer", None)
            self.values = [] if value is None else [float(x) for x in comm.all_gather(value)]

    def state_dict(self) -> Dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.values = values = state["values"]
        if not values:
            return
        same_world = len(values) == comm.get_world_size()
        mean = values[comm.get_rank()] if same_world else sum(values) / len(values)
        self.detector.loss_normalizer = mean


class BestCheckpointer(HookBase):
    """
    Keep model_best.pth, the student with the best value of a metric; run on the main process.

    Unlike upstream's hook of this name it remembers the best value through resume, and a resumed
    run never starts from the best checkpoint instead of the last.
    """

    def __init__(
        self, period: int, checkpointer: Checkpointer, metric: str, datasets: Sequence[str] = ()
    ):
        """
        Args:
            period: iterations between evaluations; 0: only after training
            metric: name in the evaluation's flat results, larger is better, such as "bbox/AP"
            datasets: on which it is measured
        """
        self.period = period
        self.checkpointer = checkpointer
        self.metric = metric
        self.measure = f"{metric} on {', '.join(datasets)}"
        self.truth = [_digest_of(x) for x in datasets]
        self.best = -math.inf
        self.run = time.time_ns()  # distinguishes this run's files from an older run's

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        if self.period > 0 and next_iter % self.period == 0 and next_iter != self.trainer.max_iter:
            self._check()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # not where the last iteration failed
            self._check()

    def _check(self) -> None:
        latest = self.trainer.storage.latest().get(self.metric)
        if latest is None:
            logger.warning(f"TEST.BEST_METRIC: the evaluation gave no {self.metric!r}.")
            return
        value, iteration = latest
        if math.isnan(value):
            logger.warning(
                f"TEST.BEST_METRIC: {self.metric} is not a number, so {BEST}.pth is not written: "
                "nothing is detected, or the test set has no object of this size or class."
            )
        if not value > self.best:
            return
        self.best = value
        logger.info(f"Best {self.metric} so far: {value:.2f}, saved as {BEST}.pth.")
        self.checkpointer.save(BEST, iteration=iteration)

    def state_dict(self) -> Dict[str, Any]:
        measured = {"measure": self.measure, "truth": self.truth}
        return {"best": self.best, "run": self.run, **measured}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        if state.get("measure", self.measure) != self.measure:
            logger.warning(
                f"{BEST}.pth was chosen by {state['measure']}; the next evaluation replaces it, "
                f"and {self.measure} chooses from then on."
            )
            return
        if state.get("truth", self.truth) != self.truth:
            logger.warning(
                f"{BEST}.pth was chosen by {self.measure}, of which the JSON has changed since; "
                "the next evaluation replaces it."
            )
            return
        self.best, self.run = state["best"], state["run"]
        # The checkpoint was written before the evaluation of its own iteration.
        path = os.path.join(self.checkpointer.save_dir, f"{BEST}.pth")
        try:
            saved = read_verified(path)
        except ValueError as error:
            if os.path.isfile(path) or self.best > -math.inf:
                logger.error(f"{path} cannot be read ({error}); the next evaluation replaces it.")
            self.best = -math.inf
            return
        saved = saved.get("trainer", {}).get("hooks", {}).get(type(self).__qualname__, {})
        if saved.get("run") == self.run:
            self.best = saved["best"]


def _digest_of(dataset: str) -> str:
    """SHA256 of a data set's JSON; "" where it has none."""
    known = dataset in DatasetCatalog.list()  # MetadataCatalog.get would create an entry
    path = MetadataCatalog.get(dataset).get("json_file") if known else None
    return sha256_of(path) if path else ""


class MakeUpEvaluation(HookBase):
    """
    Evaluate what a resumed run goes on from, where the run was killed between the save of that
    checkpoint and the end of the evaluation that is due after the same iteration.
    """

    def __init__(self, hooks: Sequence[HookBase], folder: str):
        """
        Args:
            hooks: that evaluate, and act on the result, after some iterations
            folder: OUTPUT_DIR
        """
        self.hooks = hooks
        self.folder = folder

    def before_train(self) -> None:
        trainer, next_iter = self.trainer, self.trainer.start_iter
        if next_iter == trainer.stage.start or is_evaluated(self.folder, next_iter - 1):
            return
        trainer.iter = trainer.storage.iter = next_iter - 1  # under which it is logged
        for hook in self.hooks:
            hook.after_step()
        trainer.iter = trainer.storage.iter = next_iter
