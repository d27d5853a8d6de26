"""Whether heads ask a student that is trained already to put its channels into another order."""

import logging
from typing import Collection

from torch import nn

from ...distiller import Distiller
from ...weights.coverage import has_neck, part_of

logger = logging.getLogger(__name__)


def warn_of_own_pyramid(distiller: Distiller, missing: Collection[str]) -> None:
    """
    A student that was trained alone has a pyramid of its own: its channel i is not the teacher's. A
    head that compares the two without a layer in between asks it to unlearn it.

    Args:
        distiller: has inherited
        missing: the student's parameters that MODEL.WEIGHTS did not cover
    """
    student = distiller.student
    keys = [k for k, _ in student.named_parameters()]
    neck = {k for k in keys if part_of(k, has_neck(student)) == "neck"}
    names = [name for name, head in distiller.heads.items() if compares_channels(head)]
    inherited = any("neck" in lesson.inherit_parts for lesson in distiller.lessons)
    # Some is missing where the file is of another kind of detector, with the same levels but one.
    is_loaded = 2 * len(neck - set(missing)) > len(neck)
    if not names or not is_loaded or inherited:
        return
    logger.warning(
        "MODEL.WEIGHTS brings a trained pyramid, whose channel i "
        f"{' and '.join(names)} will compare with the teacher's channel i. Unless it was trained "
        "with this teacher, these are different channels, and the student loses AP: set "
        "DISTILL.ADAPT_EQUAL_CHANNELS True, or let it inherit neck and head (DISTILL.INHERIT "
        '["neck", "head"]). See docs/no_gain.md.'
    )


def compares_channels(head: nn.Module) -> bool:
    """Whether a head compares channel i with channel i; a generator is a layer in between."""
    by_level = [x for x in head.children() if isinstance(x, nn.ModuleDict)]
    is_direct = any(isinstance(x, nn.Identity) for levels in by_level for x in levels.values())
    return is_direct and not hasattr(head, "generator")
