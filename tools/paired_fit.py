"""Whether a teacher helps its student to fit its training images, or keeps it from that."""

from typing import List, Sequence, Tuple

import numpy as np

from d2kd.engine.metrics import Metrics


def describe_fit(runs: Sequence[Tuple[str, str]]) -> str:
    """
    A line on the student's own losses at the end of training, which both have on the same images.

    Args:
        runs: folder of the student alone and of the distilled one, of each seed

    Returns:
        "" where one has no such losses
    """
    ends: List[Tuple[float, ...]] = []
    for folders in runs:
        alone, distilled = map(Metrics, folders)
        names = alone.losses()[1:]  # without the total
        if not names or not set(names) <= set(distilled.losses()):
            return ""
        ends.append((alone.at_end(names), distilled.at_end(names)))
    alone, distilled = np.mean(ends, axis=0)
    line = f"The student's own losses at the end: {alone:.3f} alone, {distilled:.3f} distilled"
    each = "" if len(ends) == 1 else " with each seed"
    if all(b < a for a, b in ends):
        return f"{line}, lower{each}:\nthe teacher helps the student to fit its training images."
    if all(b > a for a, b in ends):
        return (
            f"{line}, higher{each}:\nthe teacher keeps the student from fitting its training "
            "images. Try less weight, or a SCHEDULE that ends: docs/no_gain.md."
        )
    return f"{line}."
