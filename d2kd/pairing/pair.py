"""Student, teacher, and which kinds of them a method takes."""

from dataclasses import dataclass, replace
from typing import Dict, Optional, Tuple

from ..views import DetectorInfo, anchor_order
from .classes import CommonClasses
from .levels import LevelPair

# "teacher -> student". A dense detector predicts at every cell of its pyramid, a two-stage one in
# regions.
DENSE = frozenset({"dense -> dense"})
TWO_STAGE = frozenset({"two-stage -> two-stage"})
SAME_KIND = DENSE | TWO_STAGE
ANY_PAIR = SAME_KIND | {"two-stage -> dense", "dense -> two-stage"}


@dataclass(frozen=True)
class DistillPair:
    """
    A student, a teacher, and the levels on which the one learns from the other.

    `classes`: those that both know; None: their names are not known, and class i of one is taken
    for class i of the other.
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
        """Class i of one is class i of the other, as far as is known."""
        return self.classes is None or self.classes.same

    @property
    def in_common_classes(self) -> "DistillPair":
        """The pair as a head sees it that compares class logits: with the classes of both."""
        if self.same_classes:
            return self
        count = len(self.classes.student)
        student, teacher = (replace(x, num_classes=count) for x in (self.student, self.teacher))
        return replace(self, student=student, teacher=teacher)

    @property
    def anchor_orders(self) -> Dict[str, Tuple[int, ...]]:
        """
        Where each of the student's anchors stands in a cell of the teacher's, by the teacher's
        level; without the levels on which they stand in the same order, or are not the same.
        """
        orders = {}
        for level in self.levels:
            ours, theirs = (
                x.anchors.get(k, ())
                for x, k in ((self.student, level.student), (self.teacher, level.teacher))
            )
            order = anchor_order(ours, theirs)
            if order and order != tuple(range(len(order))):
                orders[level.teacher] = order
        return orders

    @property
    def dense_levels(self) -> Tuple[LevelPair, ...]:
        """
        The pairs of levels on which both detectors predict something at every cell.

        Raises:
            ValueError: there is none
        """
        ours, theirs = self.student.dense_levels, self.teacher.dense_levels
        levels = tuple(p for p in self.levels if p.student in ours and p.teacher in theirs)
        if not levels:
            raise ValueError(
                f"DISTILL.LEVELS: of the paired levels, {', '.join(p.student for p in self.levels)}"
                ", there is none on which both detectors predict; the student does on "
                f"{', '.join(ours)}, the teacher on {', '.join(theirs)}."
            )
        return levels
