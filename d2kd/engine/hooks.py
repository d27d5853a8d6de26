"""Hooks that Detectron2 lacks, or has only in its newest version."""
import logging
import math
import random
from typing import Any, Dict

import numpy as np
import torch
from fvcore.common.checkpoint import Checkpointer

from detectron2.engine import HookBase
from detectron2.utils import comm

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


class BestCheckpointer(HookBase):
    """
    Keep model_best.pth, the student with the best value of a metric; run on the main process.

    Unlike upstream's hook of this name it remembers the best value through resume, and a resumed
    run never starts from the best checkpoint instead of the last.
    """

    def __init__(self, period: int, checkpointer: Checkpointer, metric: str):
        """
        Args:
            period: iterations between evaluations; 0: only after training
            metric: name in the evaluation's flat results, larger is better, such as "bbox/AP"
        """
        self.period = period
        self.checkpointer = checkpointer
        self.metric = metric
        self.best = -math.inf

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        if self.period > 0 and next_iter % self.period == 0 and next_iter != self.trainer.max_iter:
            self._check()

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._check()

    def _check(self) -> None:
        latest = self.trainer.storage.latest().get(self.metric)
        if latest is None:
            logger.warning(f"TEST.BEST_METRIC: the evaluation gave no {self.metric!r}.")
            return
        value, iteration = latest
        # An evaluation without detections gives NaN, which is no best.
        if not value > self.best:
            return
        self.best = value
        logger.info(f"Best {self.metric} so far: {value:.2f}, saved as model_best.pth.")
        last = self.checkpointer.get_checkpoint_file() if self.checkpointer.has_checkpoint() else ""
        self.checkpointer.save("model_best", iteration=iteration)
        if last:
            self.checkpointer.tag_last_checkpoint(last.rsplit("/", 1)[-1])

    def state_dict(self) -> Dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.best = state["best"]
