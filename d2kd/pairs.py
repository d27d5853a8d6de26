"""Student, teacher, and which kinds of them a method takes."""

from dataclasses import dataclass
from typing import Tuple

from .pyramid import LevelPair
from .views import DetectorInfo

# "teacher -> student". A dense detector predicts at every cell of its pyramid, a two-stage one in
# regions.
DENSE = frozenset({"dense -> dense"})
TWO_STAGE = frozenset({"two-stage -> two-stage"})
SAME_KIND = DENSE | TWO_STAGE
ANY_PAIR = SAME_KIND | {"two-stage -> dense", "dense -> two-stage"}


@dataclass(frozen=True)
class DistillPair:
    """A student, a teacher, and the levels on which the one learns from the other."""

    student: DetectorInfo
    teacher: DetectorInfo
    levels: Tuple[LevelPair, ...]

    @property
    def kind(self) -> str:
        """One of ANY_PAIR."""
        sides = self.teacher, self.student
        return " -> ".join("two-stage" if x.two_stage else "dense" for x in sides)

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
