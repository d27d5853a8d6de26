"""Pair pyramid levels of student and teacher, once, when the model is built."""

from dataclasses import dataclass
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from torch import Tensor

from detectron2.layers import ShapeSpec

from ..utils.checks import nearest
from ..views import DetectorView


@dataclass(frozen=True)
class LevelPair:
    """
    One student level and the teacher level it learns from.

    `student` and `teacher` are names in the two backbones' outputs, such as "p3"; strides are in
    input pixels per cell. Heads use `student` as the name of the pair. `adapt_equal`: equally many
    channels are not the same ones (DISTILL.ADAPT_EQUAL_CHANNELS).
    """

    student: str
    teacher: str
    student_channels: int
    teacher_channels: int
    student_stride: int
    teacher_stride: int
    adapt_equal: bool = False


def pair_levels(
    student: Mapping[str, ShapeSpec],
    teacher: Mapping[str, ShapeSpec],
    named: Sequence[Sequence[str]] = (),
    adapt_equal: bool = False,
) -> Tuple[LevelPair, ...]:
    """
    Pair levels of equal stride, or those listed in `named`; finest first.

    Levels of equal stride represent objects of equal size; levels of equal name need not (p3 of one
    detector may have the stride of another's p2).

    Args:
        student, teacher: level name to shape, as a backbone's output_shape() gives it
        named: pairs of (student level, teacher level) from DISTILL.LEVELS; empty: by stride
        adapt_equal: see LevelPair

    Raises:
        ValueError: a named level does not exist, strides of a named pair differ, a student level is
            named twice, or there is no pair.
    """
    if named:
        chosen = [_named_pair(pair, student, teacher) for pair in named]
        students = [s for s, _ in chosen]
        if len(set(students)) < len(students):
            raise ValueError(f"DISTILL.LEVELS names a student level twice: {students}.")
    else:
        by_stride = _by_stride(teacher)
        chosen = [(s, by_stride[k]) for k, s in _by_stride(student).items() if k in by_stride]
    if not chosen:
        raise ValueError(
            "No common level: student and teacher have no stride in common.\n"
            f"  student: {_describe(student)}\n  teacher: {_describe(teacher)}\n"
            "Choose backbones whose output levels share a stride."
        )
    pairs = [make_pair(s, t, student, teacher, adapt_equal) for s, t in chosen]
    # Heads that use the first NUM_LEVELS count on the order.
    return tuple(sorted(pairs, key=lambda x: x.student_stride))


def make_pair(
    student_level: str,
    teacher_level: str,
    student: Mapping[str, ShapeSpec],
    teacher: Mapping[str, ShapeSpec],
    adapt_equal: bool = False,
) -> LevelPair:
    s, t = student[student_level], teacher[teacher_level]
    sizes = s.channels, t.channels, s.stride, t.stride
    return LevelPair(student_level, teacher_level, *sizes, adapt_equal)


def match_levels(
    pairs: Sequence[LevelPair], student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> Iterator[Tuple[str, Tensor, Tensor]]:
    """
    Yield (name, student feature, teacher feature) of every pair, over the same part of the image.

    Detectors with different size divisibility pad the same batch to different sizes. Padding is
    added on the right and at the bottom, so cropping both maps to the common size removes only
    padding.

    Args:
        student, teacher: level name to (N, Cs, Hi, Wi) and (N, Ct, Hi', Wi')

    Yields:
        the student level's name, (N, Cs, H, W), (N, Ct, H, W) with H = min(Hi, Hi'), W likewise
    """
    for pair in pairs:
        yield (pair.student, *match_level(pair, student, teacher))


def match_level(
    pair: LevelPair, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> Tuple[Tensor, Tensor]:
    """As match_levels, for a single pair and without its name."""
    x, target = student[pair.student], teacher[pair.teacher]
    assert pair.student_stride == pair.teacher_stride, (
        f"{pair.student} (stride {pair.student_stride}) and {pair.teacher} (stride "
        f"{pair.teacher_stride}) do not cover the same pixels: a head must resize them itself"
    )
    return crop_to(x, target), crop_to(target, x)


def match_inside(
    pairs: Sequence[LevelPair], student: DetectorView, teacher: DetectorView
) -> Iterator[Tuple[str, Tensor, Tensor, Optional[Tensor]]]:
    """
    As match_levels, for two views and with a mask of the cells that are not padding.

    Yields:
        the student level's name, (N, Cs, H, W), (N, Ct, H, W) without gradient, boolean
        (N, 1, H, W) that is True in cells inside the image; None: all are
    """
    for level, x, target in match_levels(pairs, student.features, teacher.features):
        yield level, x, target.detach(), student.inside_image(level, like=x)


def crop_to(x: Tensor, other: Tensor) -> Tensor:
    """Crop (..., H, W) at the bottom and right to the size of `other`, where that is smaller."""
    if x.shape[-2] <= other.shape[-2] and x.shape[-1] <= other.shape[-1]:
        return x
    return x[..., : other.shape[-2], : other.shape[-1]]


def describe_plan(
    pairs: Sequence[LevelPair],
    student: Mapping[str, ShapeSpec],
    teacher: Mapping[str, ShapeSpec],
) -> str:
    """The paired levels, and the unused levels of either side, as lines of text."""
    lines = [
        f"  {p.student} (stride {p.student_stride}, {p.student_channels} channels) <- "
        f"{p.teacher} (stride {p.teacher_stride}, {p.teacher_channels} channels)"
        for p in pairs
    ]
    for side, shapes, used in (
        ("student", student, {p.student for p in pairs}),
        ("teacher", teacher, {p.teacher for p in pairs}),
    ):
        unused = [k for k in shapes if k not in used]
        if unused:
            lines.append(f"  unused levels of the {side}: {', '.join(unused)}")
    return "\n".join(lines)


def _by_stride(shapes: Mapping[str, ShapeSpec]) -> Dict[int, str]:
    """Stride to level name, finest first."""
    return {shapes[k].stride: k for k in sorted(shapes, key=lambda k: shapes[k].stride)}


def _named_pair(
    pair: Sequence[str], student: Mapping[str, ShapeSpec], teacher: Mapping[str, ShapeSpec]
) -> Tuple[str, str]:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise ValueError(
            f"DISTILL.LEVELS has the entry {pair!r}; each must be [student level, teacher level]."
        )
    for level, side, shapes in zip(pair, ("student", "teacher"), (student, teacher)):
        if not isinstance(level, str) or level not in shapes:
            near = nearest(level, shapes)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"DISTILL.LEVELS names {level!r}, which the {side} does not have. {hint}"
                f"Its levels: {_describe(shapes)}."
            )
    s, t = student[pair[0]], teacher[pair[1]]
    if s.stride != t.stride:
        raise ValueError(
            f"DISTILL.LEVELS pairs {pair[0]!r} (stride {s.stride}) with {pair[1]!r} (stride "
            f"{t.stride}): d2kd does not resize maps implicitly. Pair equal strides, or use a head "
            "that resizes (PKD with MATCH: index)."
        )
    return tuple(pair)


def _describe(shapes: Mapping[str, ShapeSpec]) -> str:
    levels: List[str] = [f"{k} (stride {v.stride})" for k, v in shapes.items()]
    return ", ".join(levels)
