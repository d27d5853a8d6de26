"""
Outlines of the built-in synthetic set. An outline is a list of polygons, each (P, 2) in XY, inside
the unit circle; a pixel is inside the figure if an odd number of polygons contains it.
"""

from typing import Callable, Dict, List

import numpy as np

Outline = List[np.ndarray]


def regular(corners: int) -> np.ndarray:
    """Returns: (corners, 2), the regular polygon on the unit circle, a corner at the top."""
    angles = 2 * np.pi * np.arange(corners) / corners - np.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _ring(rng: np.random.Generator) -> Outline:
    return [regular(64), rng.uniform(0.35, 0.75) * regular(64)]


def _star(rng: np.random.Generator) -> Outline:
    points = regular(10)
    points[1::2] *= rng.uniform(0.42, 0.58)
    return [points]


def _cross(rng: np.random.Generator) -> Outline:
    a = rng.uniform(0.22, 0.36)
    b = np.sqrt(1 - a**2)
    quarter = np.array([[a, -b], [a, -a], [b, -a]])
    turns = [np.array([[c, s], [-s, c]]) for c, s in [(1, 0), (0, 1), (-1, 0), (0, -1)]]
    return [np.concatenate([quarter @ turn for turn in turns])]


# Class name -> outline, in the order of the category ids, which start at 1. Some are deliberately
# similar: a disc and a ring with a small hole.
CLASSES: Dict[str, Callable[[np.random.Generator], Outline]] = {
    "disc": lambda rng: [regular(64)],
    "ring": _ring,
    "triangle": lambda rng: [regular(3)],
    "square": lambda rng: [regular(4)],
    "star": _star,
    "cross": _cross,
}


def _bar(rng: np.random.Generator) -> Outline:
    return [regular(4) @ np.array([[1, 1], [-1, 1]]) / np.sqrt(2) * [1, rng.uniform(0.04, 0.3)]]


def _half_disc(rng: np.random.Generator) -> Outline:
    return [regular(64)[:33]]


def _crescent(rng: np.random.Generator) -> Outline:
    points = regular(64)
    inner = points[32:0:-1] * [rng.uniform(0.3, 0.6), 1]
    return [np.concatenate([points[:33], inner])]


def _wave(rng: np.random.Generator) -> Outline:
    x = np.linspace(-0.9, 0.9, 40)
    y = 0.25 * np.sin(rng.uniform(4, 12) * x)
    up, down = np.stack([x, y - 0.06], axis=1), np.stack([x, y + 0.06], axis=1)
    return [np.concatenate([up, down[::-1]])]


# Background figures without a class: too long, cut or bent to be taken for one of the classes.
DISTRACTORS: List[Callable[[np.random.Generator], Outline]] = [
    _bar,
    _half_disc,
    _crescent,
    _wave,
    lambda rng: [regular(64) * [1, rng.uniform(0.2, 0.45)]],  # a long ellipse
    lambda rng: [regular(3) * [rng.uniform(0.15, 0.35), 1]],  # a splinter
]


def place(
    outline: Outline, rng: np.random.Generator, size: float, centre: np.ndarray, stretch: float
) -> Outline:
    """
    Stretch along a random axis, rotate by a random angle, scale and move.

    Args:
        outline: polygons of (P, 2) in the unit circle
        size: longer side of the placed figure's box, pixels
        centre: (2,) XY of the box's centre, pixels
        stretch: largest ratio between the scales of the two axes, >= 1

    Returns:
        the polygons in pixels
    """

    def turn(angle: float) -> np.ndarray:
        return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])

    matrix = turn(rng.uniform(0, 2 * np.pi)) * [1, 1 / rng.uniform(1, stretch)]
    matrix = matrix @ turn(rng.uniform(0, 2 * np.pi))
    turned = [polygon @ matrix for polygon in outline]
    points = np.concatenate(turned)
    low, high = points.min(axis=0), points.max(axis=0)
    scale = size / (high - low).max()
    return [(polygon - (low + high) / 2) * scale + centre for polygon in turned]


def area(outline: Outline) -> float:
    """Returns: pixels inside the outline; a polygon after the first is a hole in it."""

    def shoelace(p: np.ndarray) -> float:
        return abs(np.dot(p[:, 0], np.roll(p[:, 1], 1)) - np.dot(p[:, 1], np.roll(p[:, 0], 1))) / 2

    return shoelace(outline[0]) - sum(shoelace(hole) for hole in outline[1:])
