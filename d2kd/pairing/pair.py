"""A student and its teacher, and the kinds of pairs that a method supports."""

from dataclasses import dataclass, replace
from typing import Dict, List, Optional, Sequence, Tuple

from ..views import DetectorInfo, anchor_order
from ..views.anchors import Anchor
from .classes import CommonClasses
from .levels import LevelPair

# "teacher -> student". A dense detector predicts in every cell of its pyramid, a two-stage one in
# regions.
DENSE = frozenset({"dense -> dense"})
TWO_STAGE = frozenset({"two-stage -> two-stage"})
SAME_KIND = DENSE | TWO_STAGE
ANY_PAIR = SAME_KIND | {"two-stage -> dense", "dense -> two-stage"}


@dataclass(frozen=True)
class DistillPair:
    """
    A student, its teacher, and the levels to distil.

    `classes`: the common classes; None: their names are unknown, and class i of one is assumed to
    be class i of the other.
    """

    student: DetectorInfo
    teacher: DetectorInfo
    levels: Tuple[LevelPair, ...]
    classes: Optional[CommonClasses] = None

    @property
    def kind(self) -> str:
        """One of ANY_PAIR."""
        sides = self.teacher, self.student
        return " -> ".join("two-stage" if x.two_stage else "dense" for x in sides)

    @property
    def same_classes(self) -> bool:
        """Whether class i of one is class i of the other; True if names are unknown."""
        return self.classes is None or self.classes.same

    @property
    def class_indices(self) -> str:
        """Which classes of the student are which of the teacher's, to be compared."""
        if self.same_classes:
            return "class i is class i"
        return f"{list(self.classes.student)} <- {list(self.classes.teacher)}"

    @property
    def taught_classes(self) -> Dict[int, str]:
        """The student's classes of which the teacher knows something, with their names."""
        if not self.teacher.num_classes:
            return {}
        if self.classes is None:
            return {i: str(i) for i in range(self.student.num_classes)}
        names = self.classes.student_names
        return {i: names[i] for group in self.classes.student for i in group}

    @property
    def in_common_classes(self) -> "DistillPair":
        """The pair restricted to the common classes, for heads that compare class logits."""
        if self.same_classes:
            return self
        count = len(self.classes.student)
        student, teacher = (replace(x, num_classes=count) for x in (self.student, self.teacher))
        return replace(self, student=student, teacher=teacher)

    @property
    def anchors_of_levels(self) -> List[Tuple[LevelPair, Sequence[Anchor], Sequence[Anchor]]]:
        """The levels on which both have anchors, with the student's and the teacher's."""
        ours, theirs = self.student.anchors, self.teacher.anchors
        levels = [x for x in self.levels if x.student in ours and x.teacher in theirs]
        return [(x, ours[x.student], theirs[x.teacher]) for x in levels]

    @property
    def anchor_orders(self) -> Dict[str, Tuple[int, ...]]:
        """
        Index of each of the student's anchors among the teacher's, by the teacher's level. Levels
        with the same order, or with different anchors, are left out.
        """
        orders = {x.teacher: anchor_order(*anchors) for x, *anchors in self.anchors_of_levels}
        return {k: x for k, x in orders.items() if x and x != tuple(range(len(x)))}

    @property
    def dense_levels(self) -> Tuple[LevelPair, ...]:
        """
        The level pairs on which both detectors have dense predictions.

        Raises:
            ValueError: there are none
        """
        ours, theirs = self.student.dense_levels, self.teacher.dense_levels
        levels = tuple(p for p in self.levels if p.student in ours and p.teacher in theirs)
        if not levels:
            raise ValueError(
                "DISTILL.LEVELS: both detectors predict on none of the paired levels "
                f"{', '.join(p.student for p in self.levels)}; the student predicts on "
                f"{', '.join(ours)}, the teacher on {', '.join(theirs)}."
            )
        return levels
