"""The meta-architecture that trains a student with one or several frozen teachers beside it."""

import logging
from types import MappingProxyType
from typing import Any, Callable, Dict, FrozenSet, List, Mapping, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage

from .config import student_config
from .config.lessons import lesson_configs
from .heads.build import build_head
from .heads.fit import OF_BOXES
from .heads.registry import compared_levels, compares_logits, losses_by_level
from .inherit import inherit
from .lesson import Lesson, Views, check_claims
from .modeling.build import build_detector
from .modeling.trainable import check_trainable
from .pairing.levels import LevelPair
from .pairing.pair import DistillPair
from .schedule import WeightSchedule, pixel_factor
from .step import ByLevel, Step
from .teacher import Teacher, build_teacher
from .teacher.stand_in import confident
from .utils.to_device import to_device
from .views import DetectorView, find_view

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class Distiller(nn.Module):
    """
    A student, its teachers, most often one, and the distillation heads between them.

    In training: the student's own losses plus those of each head. In eval mode it *is* the student.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        lessons: Sequence[Lesson] = (),
        heads: Mapping[str, nn.Module] = MappingProxyType({}),
        schedules: Mapping[str, Callable[[int], float]] = MappingProxyType({}),
        reference_pixels: Mapping[str, int] = MappingProxyType({}),
        box_score: float = 0.0,
        image_format: str,
    ):
        """
        Args:
            student: any detector with a DetectorView
            lessons: one for each teacher; none trains the student alone
            heads: by name: as in DISTILL.HEADS, of one of several teachers NAME/HEAD
            schedules: name of a head to its weight as a function of the stage's iteration
            reference_pixels: name of a head whose loss is a sum over cells to the number of pixels
                that its weight is meant for; 0, or none: no matter how many
            box_score: of the teachers' detections that stand in for the boxes of images without
                labels; 0: no head needs any
            image_format: channel order of the batches, the student's INPUT.FORMAT
        """
        super().__init__()
        self.student = student
        self.heads = nn.ModuleDict(heads)
        self.lessons = nn.ModuleList(lessons)
        self.schedules = dict(schedules)
        self.reference_pixels = dict(reference_pixels)
        self.box_score = box_score
        self.image_format = image_format
        if lessons:
            self.student_view = find_view(student, "student")
        # The run's iteration from which the schedules count: where its stage began.
        self.start_iter = 0
        # The latest training step with a teacher; None of a student alone, or in eval mode.
        self.last_step: Optional[Step] = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict[str, Any]:
        check_trainable(student_config(cfg))
        # The student first: its initialisation must not depend on whether there is a teacher.
        student = build_detector(student_config(cfg), "The student")
        if not cfg.DISTILL.ENABLED:
            logger.warning("DISTILL.ENABLED is False: training the student alone.")
            return {"student": student, "image_format": cfg.INPUT.FORMAT}
        teachers = []
        for own in lesson_configs(cfg):
            with own.in_errors():
                teachers.append(build_teacher(own.cfg))
        return cls.between(cfg, student, *teachers)

    @staticmethod
    def between(cfg: CfgNode, student: nn.Module, *teachers: Teacher) -> Dict[str, Any]:
        """Arguments of a Distiller of detectors that are built already."""
        lessons, heads, schedules, pixels = [], {}, {}, {}
        for own, teacher in zip(lesson_configs(cfg), teachers):
            with own.in_errors():
                lesson = Lesson.between(own, student, teacher)
                lessons.append(lesson)
                for name, head in zip(own.cfg.DISTILL.HEADS, lesson.heads):
                    heads[head] = build_head(name, own.cfg, lesson.pair)
                    schedules[head] = WeightSchedule.from_config(name, own.cfg)
                    pixels[head] = own.cfg.DISTILL[name].get("REFERENCE_PIXELS", 0)
        check_claims(lessons, cfg)
        return {
            "student": student,
            "lessons": lessons,
            "heads": heads,
            "schedules": schedules,
            "reference_pixels": pixels,
            "box_score": cfg.DISTILL.UNLABELLED.BOX_SCORE,
            "image_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        return self.student.device

    @property
    def requires(self) -> FrozenSet[str]:
        """What the heads require of the student's view."""
        return frozenset().union(*(x.requires for x in self.lessons))

    @property
    def teacher(self) -> Optional[Teacher]:
        """The first one; None of a student alone."""
        return self.lessons[0].teacher if self.lessons else None

    @property
    def teacher_manifest(self) -> Dict[str, str]:
        """Of the teacher, and what it teaches; the keys of several begin with their names."""
        return {
            f"{x.name}: {key}" if x.name else key: value
            for x in self.lessons
            for key, value in {**x.teacher.manifest, "classes": x.pair.class_indices}.items()
        }

    @property
    def pair(self) -> Optional[DistillPair]:
        """The student and its first teacher; None of a student alone."""
        return self.lessons[0].pair if self.lessons else None

    @property
    def levels_of_heads(self) -> Dict[str, Sequence[LevelPair]]:
        """
        The paired levels of DISTILL.LEVELS that a head compares on; none of a head that compares
        regions, which that key does not keep from any level.
        """
        return {
            name: lesson.pair.levels if compared_levels(self.heads[name]) else ()
            for lesson in self.lessons
            for name in lesson.heads
        }

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
        if not self.training or not self.lessons:
            return self.student(batched_inputs)
        # Once, not once for each detector. Instances stay: Detectron2 draws them on the CPU only.
        batched_inputs = [
            {**x, "image": to_device(x["image"], self.device)} for x in batched_inputs
        ]
        weights = self._scheduled_weights()
        is_on = any(weights.values())
        labelled = [x for x in batched_inputs if "instances" in x]
        unlabelled = [x for x in batched_inputs if "instances" not in x]
        losses: Dict[str, Tensor] = {}
        steps: List[Step] = []
        if unlabelled and is_on:
            steps.append(self._view_unlabelled(unlabelled, weights))
        if labelled:
            steps.append(self._view_labelled(labelled, weights))
            with steps[-1].student.record(self.requires):
                losses.update(self.student(labelled))
        for index, lesson in enumerate(self.lessons):
            pairs = [(x.student, x.teachers[index]) for x in steps]
            comparable = [lesson.comparable(*x) for x in pairs]
            for name in lesson.heads:
                views = comparable if compares_logits(self.heads[name]) else pairs
                for key, loss in self._distill(lesson, name, weights[name], views).items():
                    assert key not in losses, f"{name} returns {key!r}, a name that is taken"
                    losses[key] = loss
        if not steps:  # no labelled image, and every head off: zeros, which DDP wants of each
            losses["loss_none"] = sum(0 * p.sum() for p in self.student.parameters())
        return losses

    def _scheduled_weights(self) -> Dict[str, float]:
        """Weight of each head in this iteration, logged; outside a trainer, in iteration 0."""
        try:
            storage = get_event_storage()
        except AssertionError:
            storage = None
        iteration = (storage.iter if storage else 0) - self.start_iter
        weights = {name: self.schedules[name](iteration) for name in self.heads}
        for name, weight in weights.items() if storage else ():
            storage.put_scalar(f"{name}/weight", weight, smoothing_hint=False)
        return weights

    def _view_labelled(
        self, batched_inputs: List[Dict[str, Any]], weights: Mapping[str, float]
    ) -> Step:
        student = self.student_view(self.student, batched_inputs)
        teachers = [self.view_of_teacher(batched_inputs, lesson) for lesson in self.lessons]
        # Before the student: what a teacher's forward passes through is freed again, while what
        # the student's passes through stays for the backward. Together they would be the peak.
        self._read_features(teachers, weights)
        # Already here: a student may stop in its forward, and be explained by its features.
        self.last_step = Step(student, teachers)
        return self.last_step

    def _view_unlabelled(
        self, batched_inputs: List[Dict[str, Any]], weights: Mapping[str, float]
    ) -> Step:
        """The student does not see them in a forward of its own, which would take losses."""
        batched_inputs = [dict(x) for x in batched_inputs]  # which get "instances"
        teachers = [self.view_of_teacher(batched_inputs, lesson) for lesson in self.lessons]
        if self.box_score and self.requires & OF_BOXES:
            found = [
                confident(view.detections(), self.box_score, lesson.pair.classes)
                for view, lesson in zip(teachers, self.lessons)
                if lesson.pair.teacher.num_classes
            ]
            of_images = [Instances.cat(list(x)) for x in zip(*found)]
            for view_inputs in (batched_inputs, *(x.batched_inputs for x in teachers)):
                for x, instances in zip(view_inputs, of_images):
                    x["instances"] = instances
        self._read_features(teachers, weights)
        student = self.student_view.of_unlabelled(self.student, batched_inputs, self.requires)
        self.last_step = Step(student, teachers)
        return self.last_step

    def _read_features(
        self, teachers: Sequence[DetectorView], weights: Mapping[str, float]
    ) -> None:
        """What heads read that are on, of one teacher after the other."""
        for lesson, view in zip(self.lessons, teachers):
            on = [name for name in lesson.heads if weights[name]]
            if on:
                features = view.features
                for level in self.read_levels(on):
                    features[level]

    def read_levels(self, heads: Sequence[str]) -> List[str]:
        """Their teacher's levels of which these heads say that they compare features."""
        read = [pair for name in heads for pair in compared_levels(self.heads[name])]
        return list(dict.fromkeys(x.teacher for x in read))

    def view_of_teacher(
        self,
        batched_inputs: List[Dict[str, Any]],
        lesson: Optional[Lesson] = None,
        teacher: Optional[Teacher] = None,
    ) -> DetectorView:
        """
        Args:
            batched_inputs: as of :meth:`forward`
            lesson: None: the first
            teacher: its teacher with other options; None: its teacher as it is
        """
        lesson = lesson or self.lessons[0]
        return lesson.view(batched_inputs, self.image_format, self.device, teacher)

    def _distill(
        self, lesson: Lesson, name: str, weight: float, pairs: Sequence[Views]
    ) -> Dict[str, Tensor]:
        """
        The weighted losses of one head; the only place where a weight is applied.

        Args:
            pairs: views of student and teacher: of the images without labels, if there are some,
                and of the labelled ones. A head's loss is its mean over images
        """
        head = self.heads[name]
        if weight == 0:
            # Off, and the teacher is not asked. DistributedDataParallel still wants each
            # parameter of the head to take part.
            zeros = [p.sum() * 0 for p in head.parameters()]
            key = f"loss_{name.rpartition('/')[2].lower()}"
            return {lesson.loss_name(key): sum(zeros)} if zeros else {}
        terms: Dict[str, ByLevel] = {}
        total = sum(len(student.image_sizes) for student, _ in pairs)
        for student, teacher in pairs:
            share = len(student.image_sizes) / total
            share *= pixel_factor(self.reference_pixels.get(name, 0), student.image_sizes)
            for key, levels in losses_by_level(name, head(student, teacher)).items():
                sums = terms.setdefault(lesson.loss_name(key), {})
                for level, x in levels.items():
                    x = share * x if share != 1 else x
                    sums[level] = sums[level] + x if level in sums else x
        self.last_step.terms[name], self.last_step.maps[name] = terms, getattr(head, "maps", {})
        return {key: sum(levels.values()) * weight for key, levels in terms.items()}

    def inherit_from_teacher(self) -> None:
        """Initialise the parts of the student in DISTILL.INHERIT from the teacher; say which."""
        for lesson in self.lessons:
            if lesson.inherit_parts:
                same_classes = lesson.pair.same_classes
                inherit(self.student, lesson.teacher.model, lesson.inherit_parts, same_classes)
