"""What is told of the gates: a table by class, and what is wrong with some of them."""

from typing import List, Mapping, Sequence

from tabulate import tabulate

from .thresholds import Gate

HEADERS = ["class", "boxes", "threshold", "precision", "recall", "misses", "false alarms", "labels"]
FEW = 10  # a precision measured on less is little more than a guess


def gate_table(gates: Sequence[Gate], labels: Mapping[int, int]) -> str:
    """
    Args:
        labels: how many were written, by category id
    """
    rows = [[x.name, len(x.matches.truth), *_cells(x), labels[x.category_id]] for x in gates]
    aligned = ["left"] + ["right"] * (len(HEADERS) - 1)
    return tabulate(rows, HEADERS, disable_numparse=True, colalign=aligned)


def _cells(gate: Gate) -> List[str]:
    if gate.threshold is None:
        return ["-"] * 5
    shares = [f"{x:.3f}" for x in (gate.threshold, gate.precision, gate.recall)]
    return [*shares, str(len(gate.misses)), str(len(gate.false_alarms))]


def gate_warnings(gates: Sequence[Gate], wanted: float) -> List[str]:
    """One line for each class without labels, or with a threshold that is unsure."""
    lines = []
    for gate in gates:
        boxes = len(gate.matches.truth)
        if gate.threshold is None:
            best = f"its best precision is {gate.precision:.3f}, not {wanted}"
            why = best if gate.passed else "nothing was detected"
            lines.append(f"{gate.name}: no labels, because {why}.")
        elif min(boxes, gate.passed) < FEW:
            lines.append(
                f"{gate.name}: the threshold is unsure: {boxes} boxes, {gate.passed} detections."
            )
    return lines
