"""Report how much of each part of a detector its initial weights cover."""

import logging
from typing import Collection, Dict, List

from torch import nn

logger = logging.getLogger(__name__)

# Fractions of a part's parameters. With less than LEAST of every part, the file is of another
# detector; a backbone of the right depth has USUAL or more, as Detectron2 adds less than the rest.
LEAST, USUAL = 0.5, 0.75


def report_coverage(
    model: nn.Module, missing: Collection[str], path: str, found: str, advice: str
) -> None:
    """
    Log how many parameters of each part MODEL.WEIGHTS has covered.

    Args:
        missing: names that were not in the file, or of another shape
        found: what the file is, in words
        advice: what to do where nothing fits

    Raises:
        ValueError: no part is covered by half
    """
    covered = coverage(model, missing)
    total, loaded = (sum(map(f, covered.values())) for f in (len, sum))
    text = ", ".join(f"{part} {sum(x)} of {len(x)}" for part, x in covered.items())
    summary = f"MODEL.WEIGHTS: {path!r} covers {loaded} of {total} parameters of the model: {text}."
    shares = {part: sum(x) / len(x) for part, x in covered.items()}
    if max(shares.values(), default=1.0) < LEAST:
        if not loaded:
            summary = f"MODEL.WEIGHTS: nothing in {path!r} fits the model by name and shape."
        advice = advice or "These are weights of another detector or backbone."
        name = next(x for x, _ in model.named_parameters() if x in missing)
        raise ValueError(
            f"{summary} Found: {found}. Looked for: {total} parameters such as {name}. {advice} "
            "An empty value trains from scratch."
        )
    if shares.get("backbone", 1.0) < USUAL:
        logger.warning(f"{summary} Of the backbone that is little: is the file of another one?")
    else:
        logger.info(summary)


def coverage(model: nn.Module, missing: Collection[str]) -> Dict[str, List[bool]]:
    """Name of a part to whether each of its parameters is covered; heads by their modules."""
    found: Dict[str, List[bool]] = {}
    with_neck = has_neck(model)
    for name, _ in model.named_parameters():
        part = part_of(name, with_neck)
        part = name.partition(".")[0] if part == "head" else part
        found.setdefault(part, []).append(name not in missing)
    return found


def has_neck(detector: nn.Module) -> bool:
    """Whether its backbone is a pyramid on another one; that of a C4 detector is not."""
    return hasattr(getattr(detector, "backbone", None), "bottom_up")


def part_of(key: str, with_neck: bool = True) -> str:
    """The part of a detector that a state_dict entry belongs to: backbone, neck or head."""
    if not key.startswith("backbone."):
        return "head"
    return "neck" if with_neck and not key.startswith("backbone.bottom_up.") else "backbone"
