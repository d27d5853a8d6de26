"""The contract of a distillation head, and the heads that there are."""

from typing import Any, Dict, List, Type

from fvcore.common.registry import Registry
from torch import Tensor, nn

from ..pairing.levels import LevelPair
from ..utils.checks import nearest

SETS_OF_WORDS = ("requires", "pairs", "class_activations", "no_weight_decay")


class HeadRegistry(Registry):
    """Of classes named <Name>Head."""

    def _do_register(self, name: str, obj: Any) -> None:
        if not name.endswith("Head"):
            raise ValueError(
                f"DISTILL_HEAD_REGISTRY: the class {name} must be named {name}Head, which is "
                f'"{name}" in DISTILL.HEADS.'
            )
        for attribute in SETS_OF_WORDS:
            word = getattr(obj, attribute, None)
            if isinstance(word, str):  # else a set of its letters
                raise ValueError(
                    f"DISTILL_HEAD_REGISTRY: {name}.{attribute} is the word {word!r}. It must be a "
                    f"set of words: frozenset({{{word!r}}})."
                )
        super()._do_register(name, obj)


DISTILL_HEAD_REGISTRY = HeadRegistry("DISTILL_HEAD")
DISTILL_HEAD_REGISTRY.__doc__ = """
Registry of distillation heads: one published method each.

`DISTILL.HEADS: ["MGD"]` builds the registered class `MGDHead` with the keys under `DISTILL.MGD`.
A head is an nn.Module with

* `__init__`, of keyword arguments. One with a default is a key: `mask_ratio: float = 0.65` is
  DISTILL.MGD.MASK_RATIO, and one whose default is a dataclass is a node of keys. The constructor
  checks it: a ValueError that begins with its name, "mask_ratio must be in [0, 1)", is shown with
  the key in its place. What stands under `Args:` explains it (`d2kd heads MGD`). One
  without a default is a fact about the detectors: `levels`, the :class:`LevelPair` of the run, or
  `sampler`, a :class:`RegionSampler`;
* `loss_weight`, the default of LOSS_WEIGHT (1.0). `sums_over_cells = True` says that the loss grows
  with the image, and adds the key REFERENCE_PIXELS;
* `from_config(cls, cfg, pair)`, a class method, where it wants other facts, or refuses a
  :class:`DistillPair`: it returns the constructor's arguments, most of which come from
  `d2kd.heads.head_arguments(cls, cfg, pair, **facts)`, such as `levels=pair.dense_levels`, those
  with predictions of both;
* `add_config(node)`, a static method that writes keys and defaults, LOSS_WEIGHT among them, where
  the keys cannot be those of the signature. Such a head is built as `MyHead(cfg, pair)`, which
  Detectron2's @configurable and a from_config take apart;
* `pairs`, the kinds of detectors it takes, out of d2kd/pairing/pair.py (default: ANY_PAIR);
* `requires`, a frozenset of what both detectors' views must provide, such as "dense", in the words
  of :class:`DetectorView` (default: "features"), or a static method that returns it, given the
  config and the :class:`DistillPair`; `requires_logits = True` where class logits, or the boxes
  predicted of an anchor or a class, are compared one by one: a dense pair's anchors must be the
  same then, the teacher's predictions are put into the student's order of anchors, and of detectors
  with other classes the head is given the C in common, in logits, labels and `num_classes` alike
  (label C: background, or none of them);
* `class_activations`, what of {"softmax", "sigmoid"} it can make of the logits of
  `roi_predictions` (default: {"softmax"}, over classes and background);
* `forward(student, teacher)`, given two :class:`DetectorView`, returning names that start with
  "loss_", the same in every step, to either a scalar or {level name: scalar}, whose sum is the
  loss. What it reads it leaves as it is: all heads share it. Unweighted: LOSS_WEIGHT and the
  schedule are applied by the Distiller. A mean over images, or over the regions of all processes
  (`Regions.mean_count`), never a sum: else the weight would depend on the number of GPUs, and of
  images with and without labels. Without boxes or positives it returns a zero that is
  connected to the student, so that no process of a DDP run waits for a missing gradient. In a step
  with images without labels it is called twice, for these and for the labelled ones.

It may leave maps of its latest batch in `self.maps`, {name: {level: (N, 1, Hi, Wi), or coarser,
detached}}: they are drawn in the picture of the run (VIS_PERIOD).

`zero_at_equal = True` promises a loss of 0, when the head is new, between two detectors that are
the same. `TestCosine = d2kd.conformance.conformance("Cosine")` in a test file holds CosineHead to
all of this.

The head's own parameters (adapters, generators) are trained with the student, saved under
"distill_heads" and dropped from the product. Those that it names in `no_weight_decay` are not
decayed. What else it keeps between steps, such as a queue and the place where it writes next, is in
its state_dict, too, and the same in all processes, computed from the images of all: the buffers are
not broadcast, and a checkpoint has those of the main process.
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
            f"Known: {', '.join(head_names())}. One of yours is known with --plugin FILE."
        )
    return DISTILL_HEAD_REGISTRY.get(f"{name}Head")


def losses_by_level(name: str, output: Any) -> Dict[str, Dict[str, Tensor]]:
    """
    Args:
        name: of the head, for the error
        output: what its forward has returned

    Returns:
        each loss by level; under "" where it is not split by level

    Raises:
        ValueError: it is other than {"loss_...": scalar, or {level name: scalar}}
    """
    if not isinstance(output, dict):
        term = f"loss_{name.rpartition('/')[2].lower()}"
        raise ValueError(
            f"{name}: forward returns {type(output).__name__} {output!r:.60}; it must return a "
            f'dict such as {{"{term}": scalar}}.'
        )
    losses = {}
    for key, loss in output.items():
        if not (isinstance(key, str) and key.startswith("loss_")):
            raise ValueError(
                f'{name}: forward returns the key {key!r}; all keys must start with "loss_", by '
                "which d2kd recognises losses."
            )
        losses[key] = loss if isinstance(loss, dict) else {"": loss}
        if not losses[key]:
            raise ValueError(f"{name}: {key} is an empty dict; it must have at least one level.")
        for level, x in losses[key].items():
            label = f"{key}[{level!r}]" if level != "" else key
            if not isinstance(x, Tensor):
                raise ValueError(
                    f"{name}: {label} is {type(x).__name__}; it must be a tensor without "
                    "dimensions, such as `(x * 0).sum()` where there is nothing to compare."
                )
            if x.shape != ():
                raise ValueError(
                    f"{name}: {label} is {tuple(x.shape)}; reduce it to a tensor without "
                    "dimensions (.mean() or .sum())."
                )
    return losses


def compared_levels(head: nn.Module) -> List[LevelPair]:
    """The pairs of levels that a head says it compares; [] of one that compares regions."""
    return [x for x in getattr(head, "levels", ()) if isinstance(x, LevelPair)]


def compares_logits(head: Any) -> bool:
    """Whether a head, or its class, compares class logits one by one."""
    return getattr(head, "requires_logits", False)
