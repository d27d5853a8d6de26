"""The meta-architecture that trains a student with a frozen teacher beside it."""

import logging
from types import MappingProxyType
from typing import Any, Callable, Dict, FrozenSet, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage

from .config import student_config
from .heads.build import build_head
from .heads.fit import requires_of, unlabelled_misfit
from .heads.registry import compares_logits, head_class
from .inherit import inherit
from .modeling.build import build_detector
from .modeling.trainable import check_trainable
from .pairing.classes import common_classes
from .pairing.levels import LevelPair, pair_levels
from .pairing.pair import DENSE, DistillPair
from .schedule import WeightSchedule, pixel_factor
from .step import ByLevel, Step
from .teacher import Teacher, TeacherOptions, build_teacher
from .teacher.stand_in import confident
from .utils.compat import current_iteration
from .views import (
    CommonClassesView,
    DetectorView,
    HandedOnView,
    MergeClasses,
    ReorderedAnchorsView,
    describe_detector,
    find_view,
)

logger = logging.getLogger(__name__)

Views = Tuple[DetectorView, DetectorView]  # of the student and of the teacher


@META_ARCH_REGISTRY.register()
class Distiller(nn.Module):
    """
    A student, a teacher and the distillation heads between them.

    In training: the student's own losses plus one per head. In eval mode it *is* the student.
    The teacher is held outside the module tree: it has no part in state_dict(), parameters(),
    DistributedDataParallel or the optimizer, yet follows `.to(device)`.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Optional[Teacher],
        heads: Mapping[str, nn.Module],
        schedules: Mapping[str, Callable[[int], float]],
        reference_pixels: Mapping[str, int] = MappingProxyType({}),
        box_score: float = 0.0,
        image_format: str,
        inherit_parts: List[str],
        requires: FrozenSet[str] = frozenset({"features"}),
        pair: Optional[DistillPair] = None,
    ):
        """
        Args:
            student: any detector with a DetectorView
            teacher: see build_teacher; None trains the student alone
            heads: name in DISTILL.HEADS to head
            schedules: name of a head to its weight as a function of the stage's iteration
            reference_pixels: name of a head whose loss is a sum over cells to the number of pixels
                that its weight is meant for; 0, or none: no matter how many
            box_score: of the teacher's detections that stand in for the boxes of images without
                labels; 0: no head needs any
            image_format: channel order of the batches, the student's INPUT.FORMAT
            inherit_parts: parts of the student that :meth:`inherit_from_teacher` initialises
            requires: what the heads require of both views
            pair: student and teacher as the heads were told of them
        """
        super().__init__()
        self.student = student
        self.heads = nn.ModuleDict(heads)
        # Past nn.Module's own __setattr__, which would make a submodule of it.
        object.__setattr__(self, "teacher", teacher)
        self.schedules = dict(schedules)
        self.reference_pixels = dict(reference_pixels)
        self.box_score = box_score
        self.image_format = image_format
        self.inherit_parts = inherit_parts
        self.requires = requires
        self.pair = pair
        if teacher is not None:
            self.student_view = find_view(student, "student")
            self.teacher_view = find_view(teacher.model, "teacher")
        self.merges = _merges(pair)
        self.anchor_orders = pair.anchor_orders if pair and pair.kind in DENSE else {}
        # The run's iteration from which the schedules count: where its stage began.
        self.start_iter = 0
        # The latest training step with a teacher; None of a student alone, or in eval mode.
        self.last_step: Optional[Step] = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict[str, Any]:
        check_trainable(student_config(cfg))
        # The student first: its initialisation must not depend on whether there is a teacher.
        student = build_detector(student_config(cfg), "The student")
        if cfg.DISTILL.ENABLED:
            return cls.between(cfg, student, build_teacher(cfg))
        logger.warning("DISTILL.ENABLED is False: training the student alone.")
        return {
            "student": student,
            "teacher": None,
            "heads": {},
            "schedules": {},
            "image_format": cfg.INPUT.FORMAT,
            "inherit_parts": [],
        }

    @staticmethod
    def between(cfg: CfgNode, student: nn.Module, teacher: Teacher) -> Dict[str, Any]:
        """Arguments of a Distiller of two detectors that are built already."""
        names = list(cfg.DISTILL.HEADS)
        pair = describe_pair(cfg, student, teacher.model, teacher.class_names)
        if cfg.DISTILL.UNLABELLED.SETS:
            for problem in (unlabelled_misfit(name, cfg, pair) for name in names):
                if problem:
                    raise ValueError(problem)
        return {
            "student": student,
            "teacher": teacher,
            "heads": {name: build_head(name, cfg, pair) for name in names},
            "schedules": {name: WeightSchedule.from_config(name, cfg) for name in names},
            "reference_pixels": {x: cfg.DISTILL[x].get("REFERENCE_PIXELS", 0) for x in names},
            "box_score": cfg.DISTILL.UNLABELLED.BOX_SCORE,
            "image_format": cfg.INPUT.FORMAT,
            "inherit_parts": list(cfg.DISTILL.INHERIT),
            "requires": frozenset().union(
                *(requires_of(head_class(name), cfg, pair) for name in names)
            ),
            "pair": pair,
        }

    @property
    def device(self) -> torch.device:
        return self.student.device

    def forward(self, batched_inputs: List[Dict[str, Any]]) -> Union[Dict[str, Tensor], List[Any]]:
        """
        Args:
            batched_inputs: Detectron2's standard input: "image" (3, H, W) in the student's
                INPUT.FORMAT, and in training "instances"; images without these are not labelled

        Returns:
            in training, the student's losses and the weighted distillation losses, all scalars
            whose names start with "loss_"; else the student's detections
        """
        self.last_step = None
        if not self.training or self.teacher is None:
            return self.student(batched_inputs)
        batched_inputs = _to_device(batched_inputs, self.device)
        iteration = current_iteration() - self.start_iter
        weights = {name: self.schedules[name](iteration) for name in self.heads}
        is_on = any(weights.values())
        labelled = [x for x in batched_inputs if "instances" in x]
        unlabelled = [x for x in batched_inputs if "instances" not in x]
        losses: Dict[str, Tensor] = {}
        pairs: List[Views] = []
        if unlabelled and is_on:
            pairs.append(self._view_unlabelled(unlabelled))
        if labelled:
            pairs.append(self._view_labelled(labelled, is_on))
            with pairs[-1][0].record(self.requires):
                losses.update(self.student(labelled))
        comparable = [self._comparable(*x) for x in pairs]
        for name, weight in weights.items():
            views = comparable if compares_logits(self.heads[name]) else pairs
            for key, loss in self._distill(name, weight, views).items():
                assert key not in losses, f"{name} returns {key!r}, a name that is taken"
                losses[key] = loss
        if not losses:  # no labelled image, and every head off: a step that changes nothing
            losses["loss_none"] = sum(0 * p.sum() for p in self.student.parameters())
        return losses

    def _view_labelled(self, batched_inputs: List[Dict[str, Any]], is_on: bool) -> Views:
        student = self.student_view(self.student, batched_inputs)
        teacher = self.view_of_teacher(batched_inputs)
        if is_on:
            # Before the student: what its forward passes through is freed again, while what the
            # student's passes through stays for the backward. Together they would be the peak.
            self._read_features(teacher)
        # Already here: a student may stop in its forward, and be explained by its features.
        self.last_step = Step(student, teacher)
        return student, teacher

    def _view_unlabelled(self, batched_inputs: List[Dict[str, Any]]) -> Views:
        """The student does not see them in a forward of its own, which would take losses."""
        batched_inputs = [dict(x) for x in batched_inputs]  # which get "instances"
        teacher = self.view_of_teacher(batched_inputs)
        if self.box_score:
            found = confident(teacher.detections(), self.box_score, self.pair.classes)
            for view_inputs in (batched_inputs, teacher.batched_inputs):
                for x, instances in zip(view_inputs, found):
                    x["instances"] = instances
        self._read_features(teacher)
        student = self.student_view.of_unlabelled(self.student, batched_inputs, self.requires)
        self.last_step = Step(student, teacher)
        return student, teacher

    def _read_features(self, teacher: DetectorView) -> None:
        features = teacher.features
        for level in self.read_levels:
            features[level]

    @property
    def read_levels(self) -> List[str]:
        """The teacher's levels of which heads say that they compare features."""
        read = [pair for head in self.heads.values() for pair in getattr(head, "levels", ())]
        return list(dict.fromkeys(x.teacher for x in read if isinstance(x, LevelPair)))

    def view_of_teacher(
        self, batched_inputs: List[Dict[str, Any]], teacher: Optional[Teacher] = None
    ) -> DetectorView:
        """
        Args:
            batched_inputs: as of :meth:`forward`
            teacher: the same detector with other options; None: its own
        """
        teacher = teacher or self.teacher
        batch = teacher.batch(batched_inputs, self.image_format)
        view = self.teacher_view(teacher.model, batch, self.requires)
        if teacher.options == TeacherOptions():
            return view
        dtype = None if teacher.dtype is None else torch.float32
        return HandedOnView(view, self.device, dtype, teacher.autocast)

    def _comparable(
        self, student: DetectorView, teacher: DetectorView
    ) -> Tuple[DetectorView, DetectorView]:
        """
        The views as heads see them that compare class logits: the teacher's anchors in the
        student's order, and both in the classes that they have in common.
        """
        if self.anchor_orders:
            teacher = ReorderedAnchorsView(teacher, self.anchor_orders)
        if not self.merges:
            return student, teacher
        ours, theirs = self.merges
        return (
            CommonClassesView(student, ours, merge_labels=ours),
            CommonClassesView(teacher, theirs, merge_labels=ours),
        )

    def _distill(self, name: str, weight: float, pairs: Sequence[Views]) -> Dict[str, Tensor]:
        """
        The weighted losses of one head; the only place where a weight is applied.

        Args:
            pairs: views of student and teacher: of the images without labels, if there are some,
                and of the labelled ones. A head's loss is its mean over images
        """
        head = self.heads[name]
        _log(f"{name}/weight", weight)
        if weight == 0:
            # Off, and the teacher is not asked. DistributedDataParallel still wants each
            # parameter of the head to take part.
            zeros = [p.sum() * 0 for p in head.parameters()]
            return {f"loss_{name.lower()}": sum(zeros)} if zeros else {}
        terms: Dict[str, ByLevel] = {}
        total = sum(len(student.image_sizes) for student, _ in pairs)
        for student, teacher in pairs:
            share = len(student.image_sizes) / total
            if self.reference_pixels.get(name):
                share *= pixel_factor(self.reference_pixels[name], student.image_sizes)
            for key, loss in head(student, teacher).items():
                levels = loss if isinstance(loss, dict) else {"": loss}
                if share != 1:
                    levels = {level: share * x for level, x in levels.items()}
                before = terms.get(key, {})
                terms[key] = {k: before[k] + x if k in before else x for k, x in levels.items()}
        self.last_step.terms[name], self.last_step.maps[name] = terms, getattr(head, "maps", {})
        return {key: sum(levels.values()) * weight for key, levels in terms.items()}

    def inherit_from_teacher(self) -> None:
        """Initialise the parts of the student in DISTILL.INHERIT from the teacher; say which."""
        if self.inherit_parts:
            same_classes = self.pair.same_classes
            inherit(self.student, self.teacher.model, self.inherit_parts, same_classes)

    def train(self, mode: bool = True) -> "Distiller":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.model.eval()  # also after somebody switched it by hand
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], **kwargs: bool) -> "Distiller":
        # PyTorch's `recurse`, since 2.1, says whether children take part; the teacher is one,
        # unless it has a device of its own.
        takes_part = self.teacher is not None and not self.teacher.options.device
        if takes_part and kwargs.get("recurse", True):
            self.teacher.model._apply(fn, **kwargs)
        return super()._apply(fn, **kwargs)


def describe_pair(
    cfg: CfgNode, student: nn.Module, teacher: nn.Module, teacher_classes: Sequence[str] = ()
) -> DistillPair:
    """
    Match the two detectors' levels and classes.

    Args:
        teacher_classes: names that the teacher's config tells; () where it does not
    """
    infos = [
        describe_detector(detector, role)
        for role, detector in (("student", student), ("teacher", teacher))
    ]
    shapes = infos[0].shapes, infos[1].shapes
    levels = pair_levels(*shapes, named=cfg.DISTILL.LEVELS)
    counts = infos[0].num_classes, infos[1].num_classes
    classes = common_classes(cfg, *counts, teacher_classes)
    return DistillPair(infos[0], infos[1], levels, classes)


def _merges(pair: Optional[DistillPair]) -> nn.ModuleList:
    """For the student and for the teacher; empty where they have the same classes, or none."""
    if pair is None or pair.same_classes or not pair.classes.student:
        return nn.ModuleList()
    student = MergeClasses(pair.classes.student, pair.student.num_classes)
    return nn.ModuleList([student, MergeClasses(pair.classes.teacher, pair.teacher.num_classes)])


def _to_device(batched_inputs: List[Dict[str, Any]], device: torch.device) -> List[Dict[str, Any]]:
    """Move images once, not once for each detector. Detectron2 draws instances on the CPU only."""
    return [{**x, "image": x["image"].to(device)} for x in batched_inputs]


def _log(name: str, value: float) -> None:
    try:
        get_event_storage().put_scalar(name, value, smoothing_hint=False)
    except AssertionError:  # outside a trainer there is nothing to log to
        pass
