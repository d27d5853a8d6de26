"""How far a run is, by what Detectron2 logs of it."""

import os
import time
from typing import Any, Dict, List, Mapping

from d2kd.engine.facts import read_lines


def metrics_of(folder: str) -> List[Dict[str, Any]]:
    return read_lines(os.path.join(folder, "metrics.json"))


def iterations_done(folder: str) -> int:
    return max((x["iteration"] + 1 for x in metrics_of(folder)), default=0)


def training_seconds(folder: str, iterations: int) -> float:
    """Without starts and evaluations, of all attempts together, none counted twice."""
    times = {x["iteration"]: x["time"] for x in metrics_of(folder) if "time" in x}
    return iterations * sum(times.values()) / len(times) if times else float("nan")


class Clock:
    """How long runs will take, by how fast they were since the clock was made."""

    def __init__(self, runs: Mapping[str, int]):
        """
        Args:
            runs: OUTPUT_DIR of each to its iterations
        """
        self.runs = runs
        self.start, self.begun_with = time.monotonic(), self._done()

    def __str__(self) -> str:
        done, total = self._done(), sum(self.runs.values())
        seconds, new = time.monotonic() - self.start, done - self.begun_with
        left = f"{(total - done) * seconds / new / 60:.0f} min left" if new else "time unknown"
        return f"{done} of {total} iterations, {left}"

    def _done(self) -> int:
        return sum(min(iterations_done(folder), count) for folder, count in self.runs.items())
