"""
Draw one image of the built-in synthetic set: choose and place its objects. S is the image size.
"""

from typing import List, NamedTuple, Optional, Tuple

import numpy as np

from .outlines import CLASSES, Outline, area, place
from .rendering import background, camera, cover_of, paint

TRIES = 30  # positions to try for an object before it is left out


# An object's visible pixels, (S, S) bool, and its full area, pixels
Visible = Tuple[np.ndarray, float]


class Drawing(NamedTuple):
    """
    One finished image: (S, S, 3) uint8 BGR; class indices; XYXY boxes in pixels; masks of the
    visible pixels, (S, S) bool.
    """

    image: np.ndarray
    classes: List[int]
    boxes: List[Tuple[int, int, int, int]]
    masks: List[np.ndarray]


def draw(
    rng: np.random.Generator,
    image_size: int,
    num_objects: Tuple[int, int],
    object_size: Tuple[float, float],
    min_visible: float,
    own_colour: float,
    texture: float,
    clutter: int,
    noise: float,
    blur: float,
) -> Drawing:
    """
    Args:
        rng: the only source of randomness
        image_size: S
        num_objects, object_size: smallest and largest number per image, longer side in pixels
        min_visible: smallest share of an object that stays visible
        own_colour: probability that an object has roughly the hue of its class
        texture: strength of the texture of the background and of all figures, in [0, 1]
        clutter, noise, blur: largest number of figures without a class, largest standard
            deviations of noise (grey levels) and blur (pixels)
    """
    image = background(rng, image_size, clutter, texture)
    classes: List[int] = []
    visible: List[Visible] = []
    wanted = rng.integers(num_objects[0], num_objects[1] + 1)
    sizes = np.exp(rng.uniform(*np.log(object_size), size=wanted))
    # Large ones first, so that an object is never buried under a larger one.
    for size in sorted(sizes, reverse=True):
        index = int(rng.integers(len(CLASSES)))
        outline = list(CLASSES.values())[index](rng)
        found = _find_place(rng, outline, size, image_size, visible, min_visible)
        if found is None:
            continue
        cover, visible = found
        classes.append(index)
        hue = 360 * index / len(CLASSES) if rng.random() < own_colour else None
        opacity = rng.uniform(0.85, 1)
        image = paint(rng, image, cover, opacity, contrast=35, texture=texture, hue=hue)
    image = camera(rng, image, noise, blur)
    masks = [mask for mask, _ in visible]
    return Drawing(image, classes, list(map(_box, masks)), masks)


def _find_place(
    rng: np.random.Generator,
    outline: Outline,
    size: float,
    image_size: int,
    visible: List[Visible],
    min_visible: float,
) -> Optional[Tuple[np.ndarray, List[Visible]]]:
    """
    Find a place that leaves enough of this object and of all earlier ones visible.

    Args:
        outline, size: the object, and its longer side in pixels
        visible: the earlier objects

    Returns:
        the cover and the new list `visible`, or None if there is no place
    """
    for attempt in range(TRIES):
        # The centre stays a third of the size from the border, which limits truncation.
        centre = rng.uniform(size / 3, image_size - size / 3, size=2)
        # Every image needs an object; a single one always fits in the middle.
        last_resort = not visible and attempt == TRIES - 1
        if last_resort:
            centre = np.full(2, image_size / 2)
        placed = place(outline, rng, size, centre, stretch=1.25)
        cover = cover_of(placed, image_size)
        inside = cover > 0.5
        after = [(mask & ~inside, full) for mask, full in visible] + [(inside, area(placed))]
        if last_resort or all(mask.sum() >= min_visible * full for mask, full in after):
            return cover, after
    return None


def _box(mask: np.ndarray) -> Tuple[int, int, int, int]:
    """Returns: XYXY of a mask's pixels, the far edges exclusive."""
    xs, ys = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1
