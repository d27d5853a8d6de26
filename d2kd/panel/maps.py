"""Collect the maps to draw for one image of a batch, level by level."""

import math
from typing import List, NamedTuple, Optional

import cv2
import numpy as np
import torch
from torch import Tensor

from ..distiller import Distiller
from ..heads.registry import compared_levels
from ..layers import spatial_attention
from ..pairing.levels import LevelPair, crop_to, pair_levels
from ..views import DetectorView

WEIGHTS, ENERGIES = cv2.COLORMAP_INFERNO, cv2.COLORMAP_VIRIDIS
TEMPERATURE = 0.5  # attention temperature, as published for FGD


class Map(NamedTuple):
    """
    A map of one level and one image.

    `title`: what it shows; `values`: (Hi, Wi), boolean or float32, with the padding; `cell`: input
    pixels per cell; `colours`: one of cv2's colormaps, for floats.
    """

    title: str
    values: np.ndarray
    cell: int
    colours: int


Row = List[Optional[Map]]  # one map per level pair, or None


def image_maps(distiller: Distiller, index: int, lesson: int = 0) -> List[Row]:
    """
    Args:
        distiller: with a latest batch
        index: index of the image in the batch
        lesson: index of the teacher

    Returns:
        a row each for the teacher's attention, the maps recorded by its heads, and the energies of
        teacher and student
    """
    step, heads = distiller.last_step, distiller.lessons[lesson].heads
    student, teacher = step.student, step.teachers[lesson]
    pairs = _level_pairs(distiller, lesson)
    rows: List[Row] = [[_attention(teacher, p.teacher, index) for p in pairs]]
    for head in (x for x in heads if x in step.maps):
        for name, levels in step.maps[head].items():
            title, row = f"{head} {name}", [levels.get(p.student) for p in pairs]
            rows.append(
                [_head_map(student, teacher, p, x, title, index) for p, x in zip(pairs, row)]
            )
    rows.append([_energy(teacher, p.teacher, "teacher", index) for p in pairs])
    rows.append([_energy(student, p.student, "student", index) for p in pairs])
    return [row for row in rows if any(row)]


def _level_pairs(distiller: Distiller, lesson: int) -> List[LevelPair]:
    """The level pairs of the heads, finest first; if none has any, pairs of equal stride."""
    taught = distiller.lessons[lesson]
    heads = (distiller.heads[name] for name in taught.heads)
    pairs = dict.fromkeys(p for head in heads for p in compared_levels(head))
    if not pairs:
        detectors = distiller.student, taught.teacher.model
        return list(pair_levels(*(x.backbone.output_shape() for x in detectors)))
    return sorted(pairs, key=lambda p: (p.student_stride, p.teacher_stride))


def _attention(view: DetectorView, level: str, index: int) -> Map:
    """The attention of a detector: softmax over the cells of the image, scaled to mean 1."""
    inside = view.inside_image(level)
    inside = inside if inside is None else inside[index : index + 1]
    magnitudes = view.features[level][index : index + 1].float().abs()
    values = spatial_attention(magnitudes, TEMPERATURE, inside)
    return Map(f"{level} attention (teacher)", _array(values), view.strides[level], WEIGHTS)


def _energy(view: DetectorView, level: str, side: str, index: int) -> Map:
    """Mean magnitude over channels."""
    values = view.features[level][index : index + 1].float().abs().mean(dim=1, keepdim=True)
    return Map(f"{level} energy ({side})", _array(values), view.strides[level], ENERGIES)


def _head_map(
    student: DetectorView,
    teacher: DetectorView,
    pair: LevelPair,
    values: Optional[Tensor],
    title: str,
    index: int,
) -> Optional[Map]:
    """A head's recorded map for a level pair, (N, 1, H, W), possibly coarser than the features."""
    if values is None:
        return None
    grid = student.features[pair.student]
    if pair.student_stride == pair.teacher_stride:
        grid = crop_to(grid, teacher.features[pair.teacher])
    pooled = max(math.ceil(n / k) for n, k in zip(grid.shape[-2:], values.shape[-2:]))
    values = _array(values[index : index + 1])
    return Map(f"{pair.student} {title}", values, pair.student_stride * pooled, WEIGHTS)


def _array(values: Tensor) -> np.ndarray:
    """(1, 1, H, W) -> (H, W)"""
    values = values[0, 0].detach()
    return (values if values.dtype == torch.bool else values.float()).cpu().numpy()
