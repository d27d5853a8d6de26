"""Choose, for each class, the score from which its detections are labels."""

from typing import Any, Dict, List, Mapping, NamedTuple, Optional

import numpy as np

from .labelled_set import LabelledSet
from .matches import ClassMatches, match


class Gate(NamedTuple):
    """
    What lets the detections of one class pass as labels.

    `threshold`: the lowest score that passes; None: nothing does. `precision`, `recall`, `passed`
    (the number of detections): on the labelled set, at the threshold; where there is none, where
    the precision was best.
    """

    category_id: int
    name: str
    matches: ClassMatches
    threshold: Optional[float]
    precision: float
    recall: float
    passed: int

    @property
    def misses(self) -> List[Dict[str, Any]]:
        """Boxes of the labelled set that no detection that passes matches."""
        return [] if self.threshold is None else self.matches.misses(self.threshold)

    @property
    def false_alarms(self) -> List[Dict[str, Any]]:
        """Detections that pass and match no box of the labelled set."""
        return [] if self.threshold is None else self.matches.false_alarms(self.threshold)


def choose_gates(
    labelled: LabelledSet, detections: List[Dict[str, Any]], wanted: float
) -> List[Gate]:
    """
    Args:
        detections: on all images of the labelled set
        wanted: precision, in (0, 1]

    Returns:
        of each category

    Raises:
        ValueError: no class reaches the precision
    """
    matches = match(labelled.truth, detections)
    gates = [choose_gate(x, matches[x["id"]], wanted) for x in labelled.categories]
    if all(x.threshold is None for x in gates):
        best = (f"{x.name} {x.precision:.3f}" if x.passed else f"{x.name} none" for x in gates)
        raise ValueError(
            f"--precision {wanted}: no class reaches it on {labelled.name}. The best precisions: "
            f"{', '.join(best)}. Lower it, or take a better teacher."
        )
    return gates


def choose_gate(
    category: Mapping[str, Any], matches: ClassMatches, wanted: Optional[float] = None
) -> Gate:
    """
    The threshold is the lowest score at which, of all detections with this score or a higher one,
    the share that is wanted matches a box; or the score with the best F1.

    Args:
        category: COCO's
        wanted: precision; None: the best F1
    """
    scores, hits = matches.scores, np.cumsum(matches.hits)
    # A threshold cannot separate equal scores: only the last of them can be one.
    ends = np.flatnonzero(np.append(scores[1:] < scores[:-1], True)[: len(scores)])
    precision = hits[ends] / (ends + 1)
    if wanted is None:  # F1 is 2 hits / (detections + boxes)
        f1 = hits[ends] / (ends + 1 + len(matches.truth))
        reached = np.array([f1.argmax()] if len(ends) else [], dtype=int)
    else:
        reached = np.flatnonzero(precision >= wanted)
    if not len(ends):
        result = (None, 0.0, 0.0, 0)
    else:
        at = reached[-1] if len(reached) else precision.argmax()
        end = int(ends[at])
        recall = hits[end] / max(len(matches.truth), 1)
        threshold = float(scores[end]) if len(reached) else None
        result = (threshold, float(precision[at]), float(recall), end + 1)
    return Gate(category["id"], category["name"], matches, *result)
