"""What Detectron2 wrote to metrics.json: losses and AP over iterations."""

import os
import re
from typing import Dict, Iterable, List, NamedTuple

from detectron2.utils import comm

from .facts import read_lines

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_AP = re.compile(r"(?:(?P<data>.+)/)?(?P<task>bbox|segm|keypoints)/(?P<metric>AP\w*)")


class Curve(NamedTuple):
    """`iterations`, `values`: of one scalar, in order."""

    iterations: List[int]
    values: List[float]

    def forget_from(self, iteration: int) -> None:
        while self.iterations and self.iterations[-1] >= iteration:
            self.iterations.pop(), self.values.pop()

    def add(self, iteration: int, value: float) -> None:
        """A run that is resumed, or begins anew, takes the place of what was logged beyond it."""
        self.forget_from(iteration)
        self.iterations.append(iteration)
        self.values.append(value)


class Metrics:
    """Scalars of a run, by name, from its OUTPUT_DIR."""

    def __init__(self, folder: str):
        curves: Dict[str, Curve] = {}
        # Lines that were written together are in no order, but those of one scalar are. Where the
        # total loss goes back, whatever is beyond it was lost, also of scalars that this run has
        # not logged yet, such as the AP, or never does.
        for line in read_lines(os.path.join(folder, "metrics.json")):
            steps = curves["total_loss"].iterations if "total_loss" in curves else []
            if "total_loss" in line and steps and steps[-1] >= line["iteration"]:
                for curve in curves.values():
                    curve.forget_from(line["iteration"])
            for name, value in line.items():
                curves.setdefault(name, Curve([], [])).add(line["iteration"], value)
        self._curves = {name: curve for name, curve in curves.items() if curve.iterations}

    @property
    def done(self) -> int:
        """Iterations that were logged."""
        return self.curve("total_loss").iterations[-1] + 1 if self.losses() else 0

    def is_evaluated(self, iteration: int) -> bool:
        """The AP after this iteration was logged."""
        return any("/AP" in k and iteration in c.iterations for k, c in self._curves.items())

    def curve(self, name: str) -> Curve:
        return self._curves.get(name, Curve([], []))

    def losses(self) -> List[str]:
        """Names of the losses, their sum first."""
        # Not the AP of a class that is called so, such as "bbox/AP-floss".
        names = [k for k in self._curves if "loss" in k and "/AP" not in k]
        return sorted(names, key=lambda k: k != "total_loss")

    def at_end(self, names: Iterable[str]) -> float:
        """Sum of these losses, each averaged over the last tenth of the iterations."""
        total = 0.0
        for curve in map(self.curve, names):
            last = [v for i, v in zip(*curve) if i >= 0.9 * curve.iterations[-1]]
            total += sum(last) / len(last)
        return total

    def evaluations(self) -> Dict[str, Dict[str, str]]:
        """Name of a task, and of its data set where there are several, to {"AP": scalar's name}."""
        found: Dict[str, Dict[str, str]] = {}
        for name in self._curves:
            match = _AP.fullmatch(name)
            if match and match["metric"] in METRICS:
                title = " ".join(filter(None, (match["data"], match["task"])))
                found.setdefault(title, {})[match["metric"]] = name
        return found


def is_evaluated(folder: str, iteration: int) -> bool:
    """The AP after this iteration was logged, as the main process sees it. All must ask."""
    return comm.all_gather(Metrics(folder).is_evaluated(iteration))[0]
