"""Match the classes of teacher and student by their names."""

import logging
from dataclasses import dataclass, replace
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

from detectron2.config import CfgNode

from ..data import class_names
from ..utils.checks import nearest

logger = logging.getLogger(__name__)

Groups = Tuple[Tuple[int, ...], ...]


@dataclass(frozen=True)
class CommonClasses:
    """
    The C common classes of student and teacher. Each is a group of classes of both: one of each,
    or several that aliases merge.

    `student_names`, `teacher_names`: names of all classes, in order; `student`, `teacher`: class
    indices of each of the C groups; `left_out`: pairs of groups that DISTILL.TEACHER.FOR_CLASSES
    leaves out.
    """

    student_names: Tuple[str, ...]
    teacher_names: Tuple[str, ...]
    student: Groups
    teacher: Groups
    left_out: Tuple[Tuple[Tuple[int, ...], Tuple[int, ...]], ...] = ()

    @property
    def same(self) -> bool:
        """Whether class i of the student is class i of the teacher, for all classes of both."""
        one_by_one = tuple((i,) for i in range(len(self.student_names)))
        same_count = len(self.student_names) == len(self.teacher_names)
        return same_count and self.student == self.teacher == one_by_one

    @property
    def student_class(self) -> Dict[int, int]:
        """Teacher's class to student's class, where that is a single one and not several merged."""
        pairs = zip(self.student, self.teacher)
        return {t: ours[0] for ours, theirs in pairs if len(ours) == 1 for t in theirs}

    @property
    def of_one_alone(self) -> Tuple[List[str], List[str]]:
        """Names of the student's classes without a counterpart, and of the teacher's."""
        ours, theirs = zip(*self.left_out) if self.left_out else ((), ())
        found = []
        for names, groups in (
            (self.student_names, self.student + ours),
            (self.teacher_names, self.teacher + theirs),
        ):
            paired = {i for group in groups for i in group}
            found.append([name for i, name in enumerate(names) if i not in paired])
        return found[0], found[1]

    def __str__(self) -> str:
        if self.same and self.student_names == self.teacher_names:
            return f"  both have the same {len(self.student)} classes, in the same order"
        lines = [
            f"  {_listed(self.student_names, ours)} <- {_listed(self.teacher_names, theirs)}"
            for ours, theirs in zip(self.student, self.teacher)
        ]
        not_taught = [i for ours, _ in self.left_out for i in ours]
        if not_taught:
            lines.append(f"  of both, but not taught: {_listed(self.student_names, not_taught)}")
        for side, names in zip(("student", "teacher"), self.of_one_alone):
            if names:
                lines.append(f"  only in the {side}: {', '.join(names)}")
        near = _suggest_aliases(self)
        if near:
            lines.append(f"  similar names, possibly DISTILL.TEACHER.ALIASES: {near}")
        return "\n".join(lines)


def common_classes(
    cfg: CfgNode, num_student: int, num_teacher: int, teacher_names: Sequence[str]
) -> Optional[CommonClasses]:
    """
    Match the classes of the run's data set with the teacher's.

    Args:
        num_student, num_teacher: number of foreground classes of each detector
        teacher_names: class names from the teacher's config; () if unknown

    Returns:
        None if the class names of either detector are unknown

    Raises:
        ValueError: DISTILL.TEACHER.CLASSES, ALIASES or FOR_CLASSES do not fit the detectors, or are
            set although the class names of one are unknown; or there is no common class and
            DISTILL.TEACHER.ALLOW_OTHER_CLASSES is False
    """
    node = cfg.DISTILL.TEACHER
    student = _fitting(class_names(cfg), num_student, "student")
    teacher = tuple(node.CLASSES) or _fitting(teacher_names, num_teacher, "teacher")
    _check_classes(node.CLASSES, num_teacher)
    if not (student and teacher):
        _check_unnamed(node, "teacher" if student else "student")
        return None
    found = _taught(match_classes(student, teacher, node.ALIASES), node.FOR_CLASSES)
    if not (found.student or node.ALLOW_OTHER_CLASSES):
        raise ValueError(
            f"DISTILL.TEACHER: student and teacher have no class in common:\n{found}\nList equal "
            "classes in DISTILL.TEACHER.ALIASES, or set ALLOW_OTHER_CLASSES True for heads that "
            "compare features."
        )
    return found


def match_classes(
    student: Sequence[str], teacher: Sequence[str], aliases: Sequence[Sequence[str]] = ()
) -> CommonClasses:
    """
    Match classes by equal names; classes with an alias are matched by their aliases only.

    Args:
        student, teacher: names of all classes, in order
        aliases: pairs of (student's name, teacher's name). If a class is in several, its partners
            are merged. "" on one side: the other class has no counterpart

    Raises:
        ValueError: an invalid alias; two classes with the same name
    """
    for alias in aliases:
        _check_alias(alias, student, teacher)
    if tuple(student) == tuple(teacher) and not aliases:  # even with duplicate names
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


def _taught(found: CommonClasses, names: Sequence[Any]) -> CommonClasses:
    """
    Args:
        names: DISTILL.TEACHER.FOR_CLASSES

    Raises:
        ValueError: a name that is no class of both, or a part of several that aliases merge
    """
    if not names:
        return found
    pairs = list(zip(found.student, found.teacher))
    of_both = [found.student_names[i] for ours, _ in pairs for i in ours]
    for name in names:
        if name not in of_both:
            hint = "".join(f" Did you mean {x!r}?" for x in nearest(str(name), of_both))
            raise ValueError(
                f"DISTILL.TEACHER.FOR_CLASSES has {name!r}. It may list the student's classes that "
                f"the teacher has too: {', '.join(of_both) or 'there are none'}.{hint}"
            )
    kept, left_out = [], []
    for ours, theirs in pairs:
        known = [found.student_names[i] for i in ours]
        wanted = [x for x in known if x in names]
        if wanted and len(wanted) < len(known):
            raise ValueError(
                f"DISTILL.TEACHER.FOR_CLASSES has {wanted[0]!r}, but aliases make one class of "
                f"{', '.join(known)}: list all of them or none."
            )
        (kept if wanted else left_out).append((ours, theirs))
    return replace(
        found,
        student=tuple(ours for ours, _ in kept),
        teacher=tuple(theirs for _, theirs in kept),
        left_out=tuple(left_out),
    )


def _indices(names: Sequence[str], chosen: Set[str]) -> Tuple[int, ...]:
    return tuple(i for i, name in enumerate(names) if name in chosen)


def _fitting(names: Sequence[str], count: int, side: str) -> Tuple[str, ...]:
    """The data set's class names, or () if the detector has a different number of classes."""
    if names and len(names) != count:
        hint = " Set DISTILL.TEACHER.CLASSES." if side == "teacher" else ""
        logger.warning(
            f"The data set in the {side}'s config has {len(names)} classes, but the {side} has "
            f"{count}: their names are unknown.{hint}"
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
            f"The {side}'s classes {indices} are all named {twice[0]!r}, so they cannot be matched "
            f"by name. Use unique names in {where}."
        )


def _check_unnamed(node: CfgNode, side: str) -> None:
    """Refuse keys that name classes, without effect if the names of a side are unknown."""
    hints = {
        "student": "They come from the data set in DATASETS.TRAIN.",
        "teacher": "Set DISTILL.TEACHER.CLASSES.",
    }
    for key in ("ALIASES", "CLASSES", "FOR_CLASSES"):
        if node[key]:
            raise ValueError(
                f"DISTILL.TEACHER.{key} {list(node[key])}: the names of the {side}'s classes are "
                f"unknown. {hints[side]}"
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


def _suggest_aliases(found: CommonClasses) -> List[List[str]]:
    """Unmatched classes with similar names, as aliases."""
    ours, theirs = found.of_one_alone
    return [[x, y] for x in ours for y in nearest(x, theirs, cutoff=0.8)]


def _listed(names: Sequence[str], indices: Sequence[int]) -> str:
    return ", ".join(names[i] for i in indices)
