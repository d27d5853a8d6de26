"""Check from all boxes of a data set that they are [x, y, width, height] in pixels."""

from typing import List, NamedTuple, Sequence

import numpy as np

# Pixels by which boxes of valid sets may exceed their image, by rounding or careless clicks
TOLERANCE = 2.0
# Minimum number of boxes for conclusions from their largest values
ENOUGH = 20


class Boxes(NamedTuple):
    """Boxes of all annotations; the arrays are float64 with columns x and y."""

    ids: Sequence[int]
    corner: np.ndarray  # (N, 2), upper left
    extent: np.ndarray  # (N, 2), width and height
    size: np.ndarray  # (N, 2), of the box's image

    def show(self, which: np.ndarray) -> str:
        """Describe the first box for which the (N,) mask `which` is True."""
        i = int(np.argmax(which))
        box = [*self.corner[i].tolist(), *self.extent[i].tolist()]
        width, height = self.size[i]
        return f"{box} of annotation {self.ids[i]} in an image of {width:.0f}x{height:.0f}"

    def some(self, which: np.ndarray) -> "Boxes":
        ids = [x for x, kept in zip(self.ids, which.tolist()) if kept]
        return Boxes(ids, self.corner[which], self.extent[which], self.size[which])

    @property
    def beyond(self) -> np.ndarray:
        """(N,), boxes that end beyond the right or lower border of their image."""
        return (self.corner + self.extent > self.size + TOLERANCE).any(1)

    @property
    def empty(self) -> np.ndarray:
        """(N,), boxes without any area inside their image."""
        end = np.minimum(self.corner + self.extent, self.size)
        return (end - np.maximum(self.corner, 0) <= 0).any(1)

    @property
    def tiny(self) -> np.ndarray:
        """(N,), boxes within the first pixel of a larger image: too small for an object."""
        values = np.concatenate([self.corner, self.extent], 1)
        return (values >= 0).all(1) & (values <= 1).all(1) & (self.size > 2).all(1)


def check_pixels(boxes: Boxes) -> List[str]:
    """
    Returns:
        warnings about single boxes

    Raises:
        ValueError: too many boxes are not [x, y, width, height] in pixels
    """
    right = "A bbox is [x, y, width, height] in pixels of its image."
    whole = boxes.some((boxes.extent > 0).all(1))
    reason = len(whole.ids) and _other_unit(whole)
    if reason:
        raise ValueError(f"{reason}. {right}")
    empty, tiny = boxes.empty, whole.tiny
    if empty.mean() > 0.5:
        raise ValueError(
            f"{empty.sum()} of {len(empty)} boxes lie outside their image or are empty, such as "
            f"{boxes.show(empty)}. {right}"
        )
    notes = []
    if empty.any():
        notes.append(
            f"{empty.sum()} of {len(empty)} boxes have no area inside their image, such as "
            f"{boxes.show(empty)}: training ignores them, evaluation counts them as missed "
            "objects"
        )
    if tiny.any():
        notes.append(
            f"{tiny.sum()} of {len(empty)} boxes lie within 0..1, such as {whole.show(tiny)}: are "
            "they fractions of the image instead of pixels?"
        )
    return notes


def _other_unit(boxes: Boxes) -> str:
    """The format that the boxes seem to have instead, with the evidence; "" if none."""
    corner, extent, size = boxes[1:]
    beyond, tiny = boxes.beyond, boxes.tiny
    if tiny.mean() > 0.5:
        return (
            f"{tiny.sum()} of {len(tiny)} boxes lie within 0..1, such as {boxes.show(tiny)}: they "
            "seem to be fractions of the image"
        )
    ordered = (extent >= corner).all(1)  # as if they were two corners
    corners = ordered & (extent <= size + TOLERANCE).all(1)
    said = f"{beyond.sum()} of {len(beyond)} boxes end beyond their image, such as "
    said += boxes.show(beyond)
    if beyond.mean() > 0.1 and corners[beyond].mean() > 0.95:
        return f"{said}, but not if read as [x0, y0, x1, y1]: they seem to be corners"
    half = extent / 2
    centred = (corner - half >= -TOLERANCE) & (corner + half <= size + TOLERANCE)
    if len(beyond) >= ENOUGH and beyond.mean() > 0.1 and centred.all(1).mean() > 0.99:
        return f"{said}, but not if x, y is the centre: they seem to be centres"
    if beyond.mean() > 0.5:
        return f"{said}: they seem to belong to images of another size"
    for full, name in ((100, "percent"), (1000, "thousandths")):
        # In a valid set not all objects lie in the upper left and end just below `full`.
        ends = (extent if ordered.mean() > 0.99 else corner + extent).max(0)
        within = (corner >= 0).all() and 0.9 * full < ends.min() and ends.max() <= 1.005 * full
        if len(beyond) >= ENOUGH and within and size.min() > 2 * full:
            first = boxes.show(np.ones(len(beyond), bool))
            return f"all boxes lie within 0..{full}, such as {first}: they seem to be {name}"
    return ""
