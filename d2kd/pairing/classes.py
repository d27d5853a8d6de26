"""Which classes of a teacher are which of its student's, told by their names."""

import logging
from dataclasses import dataclass
from typing import Any, List, Optional, Sequence, Set, Tuple

from detectron2.config import CfgNode

from ..data import class_names
from ..utils.checks import nearest

logger = logging.getLogger(__name__)

Groups = Tuple[Tuple[int, ...], ...]


@dataclass(frozen=True)
class CommonClasses:
    """
    The C classes that student and teacher have in common. Each is a group: one class of either, or
    several where aliases join them.

    `student_names`, `teacher_names`: all classes, in their order; `student`, `teacher`: the indices
    in each of the C groups.
    """

    student_names: Tuple[str, ...]
    teacher_names: Tuple[str, ...]
    student: Groups
    teacher: Groups

    @property
    def same(self) -> bool:
        """Class i of the student is class i of the teacher, and there are no others."""
        one_by_one = tuple((i,) for i in range(len(self.student_names)))
        same_count = len(self.student_names) == len(self.teacher_names)
        return same_count and self.student == self.teacher == one_by_one

    def __str__(self) -> str:
        if self.same and self.student_names == self.teacher_names:
            return f"  both know the same {len(self.student)}, in the same order"
        sides = (self.student_names, self.student), (self.teacher_names, self.teacher)
        lines = [
            f"  {_listed(self.student_names, ours)} <- {_listed(self.teacher_names, theirs)}"
            for ours, theirs in zip(self.student, self.teacher)
        ]
        for side, (names, groups) in zip(("student", "teacher"), sides):
            alone = set(range(len(names))).difference(*groups)
            if alone:
                lines.append(f"  only the {side} knows: {_listed(names, sorted(alone))}")
        near = _nearly_alike(self)
        if near:
            lines.append(f"  perhaps DISTILL.TEACHER.ALIASES: {near}")
        return "\n".join(lines)


def common_classes(
    cfg: CfgNode, num_student: int, num_teacher: int, teacher_names: Sequence[str]
) -> Optional[CommonClasses]:
    """
    Match the classes of the run's data set with the teacher's.

    Args:
        num_student, num_teacher: foreground classes that each detector predicts
        teacher_names: what the teacher's config tells of its classes; () where it does not

    Returns:
        None where the names of either's classes are not known

    Raises:
        ValueError: DISTILL.TEACHER.CLASSES or ALIASES do not fit the detectors, or one of these has
            no names; or no class is in both and DISTILL.TEACHER.ALLOW_OTHER_CLASSES is False
    """
    node = cfg.DISTILL.TEACHER
    student = _fitting(class_names(cfg), num_student, "student")
    teacher = tuple(node.CLASSES) or _fitting(teacher_names, num_teacher, "teacher")
    _check_classes(node.CLASSES, num_teacher)
    if not (student and teacher):
        _check_unnamed(node, "teacher" if student else "student")
        return None
    found = match_classes(student, teacher, node.ALIASES)
    if not (found.student or node.ALLOW_OTHER_CLASSES):
        raise ValueError(
            f"DISTILL.TEACHER: student and teacher have no class in common:\n{found}\nName equal "
            "ones in DISTILL.TEACHER.ALIASES. (ALLOW_OTHER_CLASSES True goes on with heads that "
            "compare features.)"
        )
    return found


def match_classes(
    student: Sequence[str], teacher: Sequence[str], aliases: Sequence[Sequence[str]] = ()
) -> CommonClasses:
    """
    Equal names are the same class, unless an alias says otherwise.

    Args:
        student, teacher: names of all classes of each, in their order
        aliases: pairs of (student's name, teacher's name). A class may be in several: they are
            joined. "" on one side: the other is no class that both know

    Raises:
        ValueError: an alias that is no such pair; two classes of one name, which a name cannot tell
            apart
    """
    for alias in aliases:
        _check_alias(alias, student, teacher)
    if tuple(student) == tuple(teacher) and not aliases:  # also where a name is there twice
        one_by_one = tuple((i,) for i in range(len(student)))
        return CommonClasses(tuple(student), tuple(teacher), one_by_one, one_by_one)
    for side, names in (("student", student), ("teacher", teacher)):
        _check_distinct(names, side)
    ours, theirs = {x[0] for x in aliases}, {x[1] for x in aliases}
    links = [(s, t) for s, t in aliases if s and t]
    links += [(x, x) for x in student if x in teacher and x not in ours and x not in theirs]
    groups: List[Tuple[Set[str], Set[str]]] = []
    for s, t in links:
        joined = [x for x in groups if s in x[0] or t in x[1]]
        rest = [x for x in groups if x not in joined]
        names = {s}.union(*(x[0] for x in joined)), {t}.union(*(x[1] for x in joined))
        groups = rest + [names]
    indexed = sorted((_indices(student, s), _indices(teacher, t)) for s, t in groups)
    return CommonClasses(
        tuple(student), tuple(teacher), tuple(s for s, _ in indexed), tuple(t for _, t in indexed)
    )


def _indices(names: Sequence[str], chosen: Set[str]) -> Tuple[int, ...]:
    return tuple(i for i, name in enumerate(names) if name in chosen)


def _fitting(names: Sequence[str], count: int, side: str) -> Tuple[str, ...]:
    """The names that a data set gives, unless the detector has another number of classes."""
    if names and len(names) != count:
        hint = " Give them in DISTILL.TEACHER.CLASSES." if side == "teacher" else ""
        logger.warning(
            f"The data set in the {side}'s config has {len(names)} classes, the {side} {count}: "
            f"their names are not known.{hint}"
        )
        return ()
    return tuple(names)


def _check_classes(names: Sequence[Any], count: int) -> None:
    odd = [x for x in names if not (isinstance(x, str) and x)]
    if odd or len(names) not in (0, count):
        found = f"{odd[0]!r} in {list(names)}" if odd else f"{len(names)}: {list(names)}"
        raise ValueError(
            f"DISTILL.TEACHER.CLASSES must name each of the teacher's {count} classes, got {found}."
        )


def _check_distinct(names: Sequence[str], side: str) -> None:
    twice = [x for x in dict.fromkeys(names) if list(names).count(x) > 1]
    if twice:
        indices = ", ".join(str(i) for i, x in enumerate(names) if x == twice[0])
        where = "DISTILL.TEACHER.CLASSES" if side == "teacher" else "the data set's categories"
        raise ValueError(
            f"The {side}'s classes {indices} are all called {twice[0]!r}, so that names do not "
            f"tell which is which. Give each a name of its own in {where}."
        )


def _check_unnamed(node: CfgNode, side: str) -> None:
    """Names that would be given for nothing."""
    hints = {
        "student": "They are those of the data set in DATASETS.TRAIN.",
        "teacher": "Give them in DISTILL.TEACHER.CLASSES.",
    }
    for key in ("ALIASES", "CLASSES"):
        if node[key]:
            raise ValueError(
                f"DISTILL.TEACHER.{key} {list(node[key])}: the names of the {side}'s classes are "
                f"not known. {hints[side]}"
            )


def _check_alias(alias: Any, student: Sequence[str], teacher: Sequence[str]) -> None:
    key = f"DISTILL.TEACHER.ALIASES has the entry {alias!r}"
    is_pair = isinstance(alias, (list, tuple)) and len(alias) == 2
    if not (is_pair and all(isinstance(x, str) for x in alias) and any(alias)):
        raise ValueError(f"{key}; each must be [student's class, teacher's class].")
    for name, side, known in zip(alias, ("student", "teacher"), (student, teacher)):
        if name and name not in known:
            near = nearest(name, known)
            hint = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(known)}."
            raise ValueError(f"{key}, but the {side} has no class {name!r}. {hint}")


def _nearly_alike(found: CommonClasses) -> List[List[str]]:
    """Classes without a partner whose names are nearly equal, as aliases."""
    ours, theirs = (
        [name for i, name in enumerate(names) if not any(i in group for group in groups)]
        for names, groups in (
            (found.student_names, found.student),
            (found.teacher_names, found.teacher),
        )
    )
    return [[x, y] for x in ours for y in nearest(x, theirs, cutoff=0.8)]


def _listed(names: Sequence[str], indices: Sequence[int]) -> str:
    return ", ".join(names[i] for i in indices)
