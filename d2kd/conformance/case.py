"""A test case: one distillation head between two toy detectors."""

import copy
import functools
import random
import re
import tempfile
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

import detectron2.modeling
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from ..config import merge_opts, student_config
from ..distiller import Distiller
from ..heads.build import build_head
from ..heads.registry import head_class
from ..lesson import describe_pair
from ..modeling.build import build_detector
from ..schedule import WeightSchedule
from ..teacher import Teacher, build_teacher
from .batches import batch
from .detectors import distill_config, enliven, write_teacher


class Pair(NamedTuple):
    """Two keys of DETECTORS, and the number of channels of the teacher's pyramid."""

    teacher: str
    student: str
    teacher_channels: int = 32  # 32 is also the student's number

    def __str__(self) -> str:
        return f"{self.teacher}-to-{self.student}"


PAIRS: Tuple[Pair, ...] = (
    Pair("retinanet", "retinanet"),
    Pair("faster_rcnn", "faster_rcnn"),
    Pair("faster_rcnn", "retinanet"),
    Pair("retinanet", "faster_rcnn"),
    Pair("reppoints", "reppoints"),
)
if hasattr(detectron2.modeling, "FCOS"):  # since Detectron2 0.6
    PAIRS += (Pair("fcos", "fcos"),)


# For heads that none of the others have what they require.
MASK_PAIRS = (Pair("mask_rcnn", "mask_rcnn"),)


def pairs_of(name: str) -> Tuple[Pair, ...]:
    """The pairs that a head is tried with."""
    requires = getattr(head_class(name), "requires", ())
    return PAIRS + (MASK_PAIRS if not callable(requires) and "mask_logits" in requires else ())


class Case:
    """
    A head, a pair of detectors, and a Distiller of all three. Each check gets a copy.

    Attributes:
        name: name of the head, as in DISTILL.HEADS
        distiller: the Distiller as built; checks use a copy, :meth:`fresh`
        refusal: why the head could not be built for this pair; "" if it was built
    """

    def __init__(self, name: str, pair: Pair, opts: Sequence[Any] = ()):
        """
        Args:
            opts: KEY, VALUE, ... that override the config
        """
        self.name, self.pair = name, pair
        self.cfg = _config(name, pair, opts)
        self.refusal = ""
        try:
            detectors = _detectors(self.cfg, pair, opts)
            distiller = Distiller(**Distiller.between(self.cfg, *detectors))
        except ValueError as error:
            self.refusal = str(error)
            return
        self.distiller = copy.deepcopy(distiller).train()
        enliven(self.distiller.student)
        enliven(self.distiller.teacher.model)

    def __str__(self) -> str:
        wide = self.pair.teacher_channels != Pair("", "").teacher_channels
        return f"{self.name}, {self.pair}" + (", with a wider teacher" if wide else "")

    def fresh(self, own_teacher: bool = False) -> Distiller:
        """
        A copy of the Distiller as built, unaffected by other checks.

        Args:
            own_teacher: also copy the teacher, for the check that the head does not change it
        """
        teachers = [] if own_teacher else [x.teacher for x in self.distiller.lessons]
        return copy.deepcopy(self.distiller, {id(x): x for x in teachers})

    def with_new_head(self, cfg: CfgNode, seed: int) -> Distiller:
        """The same detectors with a new head, built from `cfg`."""
        distiller = self.fresh()
        pair = describe_pair(cfg, distiller.student, distiller.teacher.model)
        seed_all(seed)
        distiller.heads[self.name] = build_head(self.name, cfg, pair).train()
        distiller.schedules[self.name] = WeightSchedule.from_config(self.name, cfg)
        return distiller

    def terms(self, distiller: Distiller, inputs: Sequence[Any] = (), seed: int = 0) -> Dict:
        """
        The head's weighted losses in one training step, without the student's own.

        Args:
            inputs: a batch; empty: two images with two boxes each
            seed: seed of all generators before the step
        """
        losses = self.losses(distiller, inputs, seed)
        return {k: losses[k] for k in distiller.last_step.losses}

    def losses(
        self, distiller: Distiller, inputs: Sequence[Any] = (), seed: int = 0
    ) -> Dict[str, Tensor]:
        """All losses of one training step; see :meth:`terms`."""
        seed_all(seed)
        with EventStorage():
            return distiller(list(inputs) or batch())


_CASES: Dict[Any, Case] = {}


def find_case(name: str, pair: Pair, opts: Sequence[Any] = ()) -> Case:
    """A cached Case; it is built once per registered class."""
    key = head_class(name), pair, repr(opts)
    if key not in _CASES:
        _CASES[key] = Case(name, pair, opts)
    return _CASES[key]


def seed_all(seed: int) -> None:
    """Seed every generator that a head may draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def check_refusal(case: Case) -> None:
    """An unsupported pair is refused with a message that says what would fit."""
    text = case.refusal
    helps = "Heads that fit" in text or re.search(r"(DISTILL\.(?!HEADS)|MODEL\.)[\w.]*[A-Z]", text)
    if not (text.startswith("DISTILL.") and re.search(rf"\b{case.name}\b", text) and helps):
        raise AssertionError(
            f"{case}: the head refuses the pair with the message {text!r}. It should start with "
            "the key, such as 'DISTILL.HEADS:', name the head, and say what would fit. If the head "
            "declares `pairs` (d2kd/pairing/pair.py) or `requires`, build_head does all of that; "
            "in from_config, raise a ValueError that names the key whose value does not fit."
        )


# Full depth, for methods that use intermediate layers. No GroupNorm: with 64 pixels P7 is a single
# cell, which it would normalise to zero.
_DENSE_HEAD = {
    "MODEL__RETINANET__NUM_CONVS": 4,
    "MODEL__RETINANET__NORM": "",
    "MODEL__FCOS__NUM_CONVS": 4,
    "MODEL__FCOS__NORM": "",
    "MODEL__REPPOINTS__NUM_CONVS": 3,
    "MODEL__REPPOINTS__NORM": "",
}


def _config(name: str, pair: Pair, opts: Sequence[Any]) -> CfgNode:
    cfg = distill_config(
        pair.student, _teacher(pair.teacher, pair.teacher_channels), [name], **_DENSE_HEAD
    )
    cfg.DISTILL[name].SCHEDULE.WARMUP_ITERS = 0  # with warm-up the first weight would be 0
    merge_opts(cfg, list(opts), "conformance(opts=...)")
    return cfg


_DETECTORS: Dict[Any, Tuple[nn.Module, Teacher, Tensor]] = {}


def _detectors(cfg: CfgNode, pair: Pair, opts: Sequence[Any]) -> Tuple[nn.Module, Teacher]:
    """Student and teacher, built once for all heads, with the generator as it was after that."""
    key = pair, repr(opts)
    seed_all(0)
    if key not in _DETECTORS:
        student = build_detector(student_config(cfg), "The student")
        _DETECTORS[key] = student, build_teacher(cfg), torch.get_rng_state()
    *detectors, state = _DETECTORS[key]
    torch.set_rng_state(state)
    return tuple(detectors)


# Not created on import: spawned processes import this module too and would not remove the folder.
@functools.lru_cache(maxsize=None)
def _folder() -> tempfile.TemporaryDirectory:
    """Removed when Python exits."""
    return tempfile.TemporaryDirectory(prefix="d2kd_conformance_")


@functools.lru_cache(maxsize=None)
def _teacher(kind: str, channels: int) -> List[Any]:
    folder = tempfile.mkdtemp(dir=_folder().name)
    return write_teacher(folder, kind, MODEL__FPN__OUT_CHANNELS=channels, **_DENSE_HEAD)
