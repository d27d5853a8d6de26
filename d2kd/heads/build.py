"""The contract of a distillation head, and how YAML names one."""

import difflib
from dataclasses import dataclass
from typing import FrozenSet, List, Tuple, Type

from fvcore.common.registry import Registry
from torch import nn

from detectron2.config import CfgNode

from ..pyramid import LevelPair
from ..views import DetectorInfo

DISTILL_HEAD_REGISTRY = Registry("DISTILL_HEAD")
DISTILL_HEAD_REGISTRY.__doc__ = """
Registry of distillation heads: one published method each.

`DISTILL.HEADS: ["MGD"]` builds the registered class `MGDHead` with the keys under `DISTILL.MGD`.
A head is an nn.Module with

* `add_config(node)`, a static method that writes its keys and defaults into `DISTILL.<NAME>`,
  LOSS_WEIGHT among them;
* `requires`, a frozenset of what it reads of both detectors' views: "features", "dense",
  "roi_features", "roi_predictions", "regions", "region_vectors" (default: "features"), or a static
  method that tells it from the :class:`DistillPair`; `requires_logits = True` where the two
  detectors' classes must be the same;
* `__init__`, made @configurable, with `from_config(cls, cfg, pair)`: `pair` is a
  :class:`DistillPair`;
* `forward(student, teacher)`, given two :class:`DetectorView`, returning names that start with
  "loss_" to either a scalar or {level name: scalar}, whose sum is the loss. Unweighted: LOSS_WEIGHT
  and the schedule are applied by the Distiller. Without boxes or positives it returns a zero that
  is connected to the student, so that no process of a DDP run waits for a missing gradient.

It may leave maps of its latest batch in `self.maps`, {name: {level: (N, 1, Hi, Wi), or coarser,
detached}}: they are drawn in the picture of the run (VIS_PERIOD).

The head's own parameters (adapters, generators) are trained with the student, saved under
"distill_heads" and dropped from the product. Those that it names in `no_weight_decay` are not
decayed.
"""


@dataclass(frozen=True)
class DistillPair:
    """A student, a teacher, and the levels on which the one learns from the other."""

    student: DetectorInfo
    teacher: DetectorInfo
    levels: Tuple[LevelPair, ...]


def head_names() -> List[str]:
    """Names that DISTILL.HEADS may contain."""
    return sorted(name[: -len("Head")] for name, _ in DISTILL_HEAD_REGISTRY)


def head_class(name: str) -> Type[nn.Module]:
    """
    Args:
        name: as in DISTILL.HEADS, such as "MGD"

    Raises:
        ValueError: no head of that name
    """
    if f"{name}Head" not in DISTILL_HEAD_REGISTRY:
        near = difflib.get_close_matches(str(name).upper(), head_names(), n=2, cutoff=0.6)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"DISTILL.HEADS names the unknown head {name!r}.{hint} "
            f"Known: {', '.join(head_names())}."
        )
    return DISTILL_HEAD_REGISTRY.get(f"{name}Head")


def build_head(name: str, cfg: CfgNode, pair: DistillPair) -> nn.Module:
    """
    Build the head `name` of DISTILL.HEADS for a pair of detectors.

    Raises:
        ValueError: the head is unknown, or needs what one of the detectors cannot give
    """
    cls = head_class(name)
    for side, detector in (("student", pair.student), ("teacher", pair.teacher)):
        missing = required_members(cls, pair) - detector.members
        if missing:
            raise ValueError(
                f"DISTILL.HEADS: {name} needs {_listed(missing)}; the {side} {detector.name} has "
                f"none. It has {_listed(detector.members)}."
            )
    if getattr(cls, "requires_logits", False):
        classes = pair.student.num_classes, pair.teacher.num_classes
        if classes[0] != classes[1]:
            raise ValueError(
                f"DISTILL.HEADS: {name} compares class logits, but the student has {classes[0]} "
                f"classes and the teacher {classes[1]}. Use a teacher of the same classes, or "
                "heads that read features alone, such as MGD or PKD."
            )
    return cls(cfg, pair)


def required_members(head: Type[nn.Module], pair: DistillPair) -> FrozenSet[str]:
    """What the head reads of both views of this pair."""
    requires = getattr(head, "requires", {"features"})
    return frozenset(requires(pair) if callable(requires) else requires)


def _listed(names: FrozenSet[str]) -> str:
    return ", ".join(sorted(names))
