"""The checkpoint that a run resumes from."""

import logging
from dataclasses import dataclass
from typing import Optional

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
