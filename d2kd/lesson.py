"""One teacher of a student, and how the two are compared."""

from typing import Any, Callable, Dict, FrozenSet, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode

from .config.lessons import LessonConfig
from .heads.fit import OF_BOXES, requires_of, unlabelled_misfit
from .heads.registry import compares_logits, head_class
from .pairing.classes import common_classes
from .pairing.levels import pair_levels
from .pairing.pair import DENSE, DistillPair
from .teacher import Teacher, TeacherOptions
from .views import (
    CommonClassesView,
    DetectorView,
    HandedOnView,
    MergeClasses,
    ReorderedAnchorsView,
    describe_detector,
    find_view,
)

Views = Tuple[DetectorView, DetectorView]  # of the student and of the teacher


class Lesson(nn.Module):
    """
    A teacher, the heads that compare the student with it, and what they ask of it.

    The teacher is held outside the module tree: it has no part in state_dict(), parameters(),
    DistributedDataParallel or the optimizer, yet follows `.to(device)`.
    """

    def __init__(
        self,
        teacher: Teacher,
        heads: Sequence[str] = (),
        requires: FrozenSet[str] = frozenset({"features"}),
        pair: Optional[DistillPair] = None,
        inherit_parts: Sequence[str] = (),
        name: str = "",
    ):
        """
        Args:
            teacher: see build_teacher
            heads: names of those in `Distiller.heads` that compare with this teacher
            requires: what they require of both views
            pair: student and teacher as the heads were told of them
            inherit_parts: parts of the student that this teacher initialises
            name: among several teachers
        """
        super().__init__()
        # Past nn.Module's own __setattr__, which would make a submodule of it.
        object.__setattr__(self, "teacher", teacher)
        self.heads = list(heads)
        self.requires = requires
        self.pair = pair
        self.inherit_parts = list(inherit_parts)
        self.name = name
        self.teacher_view = find_view(teacher.model, "teacher")
        self.merges = _merges(pair)
        self.anchor_orders = pair.anchor_orders if pair and pair.kind in DENSE else {}

    @classmethod
    def between(cls, own: LessonConfig, student: nn.Module, teacher: Teacher) -> "Lesson":
        """
        Raises:
            ValueError: levels or classes of the two do not match, or a head of the teacher cannot
                learn from images without labels, of which the run has some
        """
        cfg, names = own.cfg, list(own.cfg.DISTILL.HEADS)
        pair = describe_pair(cfg, student, teacher.model, teacher.class_names)
        if cfg.DISTILL.UNLABELLED.SETS:
            for problem in (unlabelled_misfit(name, cfg, pair) for name in names):
                if problem:
                    raise ValueError(problem)
        return cls(
            teacher,
            [f"{own.name}/{name}" if own.name else name for name in names],
            frozenset().union(*(requires_of(head_class(name), cfg, pair) for name in names)),
            pair,
            cfg.DISTILL.INHERIT,
            own.name,
        )

    def view(
        self,
        batched_inputs: List[Dict[str, Any]],
        image_format: str,
        device: torch.device,
        teacher: Optional[Teacher] = None,
    ) -> DetectorView:
        """
        The teacher's view of a batch.

        Args:
            batched_inputs: as of the data loader, "image" (3, H, W) in `image_format`
            device: where the student is
            teacher: the same detector with other options; None: its own
        """
        teacher = teacher or self.teacher
        inputs = teacher.batch(batched_inputs, image_format)
        with teacher.autocast():  # which the view keeps
            view = self.teacher_view(teacher.model, inputs, self.requires)
        if teacher.options == TeacherOptions():
            return view
        dtype = None if teacher.dtype is None else torch.float32
        return HandedOnView(view, device, dtype)

    def comparable(self, student: DetectorView, teacher: DetectorView) -> Views:
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

    def loss_name(self, key: str) -> str:
        """The name of a head's loss, "loss_...", among those of all teachers."""
        return key.replace("loss_", f"loss_{self.name}_", 1) if self.name else key

    def of_its_classes(self, classes: Tensor) -> Tensor:
        """The student's classes, of objects, that are common ones."""
        if not self.merges:
            return classes
        ours = self.merges[0]
        return classes[ours.labels(classes) < ours.num_classes]

    def train(self, mode: bool = True) -> "Lesson":
        super().train(mode)
        self.teacher.model.eval()  # also after somebody switched it by hand
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], **kwargs: bool) -> "Lesson":
        # PyTorch's `recurse`, since 2.1, says whether children take part; the teacher is one,
        # unless it has a device of its own.
        if kwargs.get("recurse", True) and not self.teacher.options.device:
            self.teacher.model._apply(fn, **kwargs)
        return super()._apply(fn, **kwargs)


def check_claims(lessons: Sequence[Lesson], cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: two teachers would teach the same class, by class logits or by detections in
            place of labels
    """
    node, needs_boxes = cfg.DISTILL.UNLABELLED, any(x.requires & OF_BOXES for x in lessons)
    detects = node.SETS and node.BOX_SCORE and needs_boxes
    rest = "heads that compare features need no such choice."
    if detects:
        rest = "what each detects stands in for boxes (DISTILL.UNLABELLED.BOX_SCORE)."
    claims: Dict[int, str] = {}
    for lesson in lessons:
        names = [name.rpartition("/")[2] for name in lesson.heads]
        if not (detects or any(compares_logits(head_class(x)) for x in names)):
            continue
        for index, name in lesson.pair.taught_classes.items():
            if index in claims:
                raise ValueError(
                    f"DISTILL.TEACHERS: the class {name!r} would be taught by both {claims[index]} "
                    f"and {lesson.name}. Say in TEACHER.FOR_CLASSES of each which of the student's "
                    f"classes it is for; {rest}"
                )
            claims[index] = lesson.name


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
    levels = pair_levels(*shapes, cfg.DISTILL.LEVELS, cfg.DISTILL.ADAPT_EQUAL_CHANNELS)
    counts = infos[0].num_classes, infos[1].num_classes
    classes = common_classes(cfg, *counts, teacher_classes)
    return DistillPair(infos[0], infos[1], levels, classes)


def _merges(pair: Optional[DistillPair]) -> nn.ModuleList:
    """For the student and for the teacher; empty where they have the same classes, or none."""
    if pair is None or pair.same_classes or not pair.classes.student:
        return nn.ModuleList()
    student = MergeClasses(pair.classes.student, pair.student.num_classes)
    return nn.ModuleList([student, MergeClasses(pair.classes.teacher, pair.teacher.num_classes)])
