"""The contract of a distillation head, and how YAML names one."""

from typing import Any, FrozenSet, Iterable, List, Optional, Sequence, Type

from fvcore.common.registry import Registry
from torch import nn

from detectron2.config import CfgNode

from ..pairing.pair import ANY_PAIR, DENSE, TWO_STAGE, DistillPair
from ..utils.checks import nearest
from ..views import anchor_order

DISTILL_HEAD_REGISTRY = Registry("DISTILL_HEAD")
DISTILL_HEAD_REGISTRY.__doc__ = """
Registry of distillation heads: one published method each.

`DISTILL.HEADS: ["MGD"]` builds the registered class `MGDHead` with the keys under `DISTILL.MGD`.
A head is an nn.Module with

* `add_config(node)`, a static method that writes its keys and defaults into `DISTILL.<NAME>`,
  LOSS_WEIGHT among them;
* `pairs`, the kinds of detectors it takes, out of d2kd/pairing/pair.py (default: ANY_PAIR);
* `requires`, a frozenset of what both detectors' views must provide, such as "dense", in the words
  of :class:`DetectorView` (default: "features"), or a static method that returns it, given the
  config and the :class:`DistillPair`; `requires_logits = True` where class logits are compared one
  by one: a dense pair's anchors must be the same then, the teacher's predictions are put into the
  student's order of anchors, and of detectors with other classes the head is given the C in common,
  in logits, labels and `num_classes` alike (label C: background, or none of them);
* `class_activations`, what of {"softmax", "sigmoid"} it can make of the logits of
  `roi_predictions` (default: {"softmax"}, over classes and background);
* `__init__`, made @configurable, with `from_config(cls, cfg, pair)`: `pair` is a
  :class:`DistillPair`;
* `forward(student, teacher)`, given two :class:`DetectorView`, returning names that start with
  "loss_" to either a scalar or {level name: scalar}, whose sum is the loss. Unweighted: LOSS_WEIGHT
  and the schedule are applied by the Distiller. Without boxes or positives it returns a zero that
  is connected to the student, so that no process of a DDP run waits for a missing gradient.

It may leave maps of its latest batch in `self.maps`, {name: {level: (N, 1, Hi, Wi), or coarser,
detached}}: they are drawn in the picture of the run (VIS_PERIOD).

`zero_at_equal = True` promises a loss of 0, when the head is new, between two detectors that are
the same. `TestMyHead = d2kd.conformance.conformance("MyHead")` in a test file holds a head to all
of this.

The head's own parameters (adapters, generators) are trained with the student, saved under
"distill_heads" and dropped from the product. Those that it names in `no_weight_decay` are not
decayed.
"""


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
        near = nearest(name, head_names(), count=2)
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
        ValueError: the head is unknown, or does not take such a pair; the error names those that do
    """
    problem = misfit(name, cfg, pair)
    if problem:
        raise ValueError(f"DISTILL.HEADS: {problem} Heads that fit: {_listed(fitting(cfg, pair))}.")
    return head_class(name)(cfg, _as_seen(name, pair))


def compares_logits(head: Any) -> bool:
    """Whether a head, or its class, compares class logits one by one."""
    return getattr(head, "requires_logits", False)


def _as_seen(name: str, pair: DistillPair) -> DistillPair:
    return pair.in_common_classes if compares_logits(head_class(name)) else pair


def misfit(name: str, cfg: CfgNode, pair: DistillPair) -> Optional[str]:
    """Why the head cannot take the pair, a sentence; None: it can."""
    cls, student, teacher = head_class(name), pair.student, pair.teacher
    names = f"teacher {teacher.name}, student {student.name}"
    pairs = getattr(cls, "pairs", ANY_PAIR)
    if pair.kind not in pairs:
        return f"{name} takes {_listed(pairs)}; this is {pair.kind} ({names})."
    for side, detector in (("student", student), ("teacher", teacher)):
        missing = requires_of(cls, cfg, pair) - detector.provides
        if missing:
            by_depth = f"tower_{cfg.DISTILL[name].get('DEPTH')}" in missing
            asked = f" (DISTILL.{name}.DEPTH)" if by_depth else ""
            return (
                f"{name} needs {_listed(missing)}{asked}; the {side} {detector.name} has none. It "
                f"has {_listed(detector.provides)}."
            )
    if "roi_predictions" in requires_of(cls, cfg, pair) and pair.kind in TWO_STAGE:
        problem = _other_activation(name, pair)
        if problem:
            return problem
    return _other_logits(name, pair) if compares_logits(cls) else None


def _other_activation(name: str, pair: DistillPair) -> Optional[str]:
    student, teacher = pair.student.class_activation, pair.teacher.class_activation
    key = "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE"
    if student != teacher:
        return (
            f"{name} compares class probabilities, which the student's box head has from a "
            f"{student} and the teacher's from a {teacher}: set {key} alike in both."
        )
    known = getattr(head_class(name), "class_activations", {"softmax"})
    if student not in known:
        return (
            f"{name} takes class probabilities from a {_listed(known)}; the box heads have {key} "
            f"{student == 'sigmoid'}, a {student}."
        )
    return None


def _other_logits(name: str, pair: DistillPair) -> Optional[str]:
    student, teacher = pair.in_common_classes.student, pair.in_common_classes.teacher
    if student.num_classes != teacher.num_classes:
        return (
            f"{name} compares class logits, but the student has {student.num_classes} classes and "
            f"the teacher {teacher.num_classes}, and their names are not known of both. Name the "
            "teacher's in DISTILL.TEACHER.CLASSES: those that are equal are compared."
        )
    if not student.num_classes:
        return f"{name} compares class logits, but the detectors have no class in common."
    return _other_anchors(name, pair) if pair.kind in DENSE else None


def _other_anchors(name: str, pair: DistillPair) -> Optional[str]:
    student, teacher = pair.student, pair.teacher
    if student.num_anchors != teacher.num_anchors:
        return (
            f"{name} compares logits cell by cell, but the student has {student.num_anchors} "
            f"anchors per cell and the teacher {teacher.num_anchors} (MODEL.ANCHOR_GENERATOR)."
        )
    for level in pair.levels:
        ours, theirs = student.anchors.get(level.student), teacher.anchors.get(level.teacher)
        if ours and theirs and anchor_order(ours, theirs) is None:
            return (
                f"{name} compares logits anchor by anchor, but on {level.student} they differ: the "
                f"student's first cell has {_boxes(ours)}, the teacher's on {level.teacher} "
                f"{_boxes(theirs)}. Train the student with the teacher's SIZES, ASPECT_RATIOS and "
                "OFFSET in MODEL.ANCHOR_GENERATOR."
            )
    return None


def _boxes(anchors: Sequence[Sequence[float]]) -> str:
    shown = ["(" + ", ".join(f"{x:g}" for x in anchor) + ")" for anchor in sorted(anchors)]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def fitting(cfg: CfgNode, pair: DistillPair) -> List[str]:
    """Names of the heads that can be built for the pair, with the keys of cfg."""
    names = []
    for name in head_names():
        try:
            if misfit(name, cfg, pair) is None:
                head_class(name).from_config(cfg, _as_seen(name, pair))
                names.append(name)
        except Exception:  # what from_config has to say against the pair, or a head of a user's
            pass
    return names


def requires_of(head: Type[nn.Module], cfg: CfgNode, pair: DistillPair) -> FrozenSet[str]:
    """What the head requires of both views of this pair."""
    requires = getattr(head, "requires", {"features"})
    if not callable(requires):
        return frozenset(requires)
    try:
        return frozenset(requires(cfg, pair))
    except TypeError as error:
        raise ValueError(
            f"{head.__name__}.requires must be a frozenset of names, or a static method of (cfg, "
            f"pair) that returns one: {error}"
        ) from error


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
