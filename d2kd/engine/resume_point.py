"""The checkpoint that a run resumes from."""

import logging
import os
from dataclasses import dataclass
from typing import Optional

from detectron2.utils import comm

from ..weights.run_checkpoints import NOT_OF_A_RUN, read_last_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """
    `path`: of the checkpoint; `done`: iterations of the run completed there, 1 or more; `seed`: of
    the run, also where SEED was left to chance.
    """

    path: str
    done: int
    seed: int

    @classmethod
    def find_together(cls, folder: str) -> Optional["ResumePoint"]:
        """
        :meth:`find` in every process.

        Raises:
            ValueError: they do not find the same
        """
        point = cls.find(folder)
        mine = f"{os.path.basename(point.path)} of seed {point.seed}" if point else "no checkpoint"
        found = comm.all_gather(mine)
        if len(set(found)) > 1:
            there = ", ".join(f"process {rank} {x}" for rank, x in enumerate(found))
            raise ValueError(
                f"OUTPUT_DIR: the processes find different checkpoints in {folder!r}: {there}. It "
                "must be on a disk that all machines share."
            )
        return point

    @classmethod
    def find(cls, folder: str) -> Optional["ResumePoint"]:
        """
        Args:
            folder: OUTPUT_DIR

        Returns:
            the last whole checkpoint; None, with a warning in the log, if there never was one

        Raises:
            ValueError: no checkpoint is whole, or the last whole one is not of a run
        """
        path, content = read_last_checkpoint(folder)
        if not path:
            logger.warning(f"There is no checkpoint in {folder!r}: the run begins.")
            return None
        try:
            state = content["trainer"]
            return cls(path, state["iteration"] + 1, state["seed"])
        except (LookupError, TypeError) as error:
            raise ValueError(f"{path} {NOT_OF_A_RUN}") from error
