"""Are boxes [x, y, width, height] in pixels? What those of a whole data set tell together."""

from typing import List, NamedTuple, Sequence

import numpy as np

# Pixels by which boxes of sound sets end beyond their image: rounded, or clicked a little outside
TOLERANCE = 2.0
# Boxes from which on their largest values tell something of all
ENOUGH = 20


class Boxes(NamedTuple):
    """Those of all annotations: ids, and two columns (x, y) of the others, in float64."""

    ids: Sequence[int]
    corner: np.ndarray  # (N, 2), upper left
    extent: np.ndarray  # (N, 2), width and height
    size: np.ndarray  # (N, 2), of the box's image

    def show(self, which: np.ndarray) -> str:
        """The first of those that a (N,) mask marks."""
        i = int(np.argmax(which))
        box = [*self.corner[i].tolist(), *self.extent[i].tolist()]
        width, height = self.size[i]
        return f"{box} of annotation {self.ids[i]} in an image of {width:.0f}x{height:.0f}"

    def some(self, which: np.ndarray) -> "Boxes":
        ids = [x for x, kept in zip(self.ids, which.tolist()) if kept]
        return Boxes(ids, self.corner[which], self.extent[which], self.size[which])

    @property
    def beyond(self) -> np.ndarray:
        """(N,), those that end beyond their image to the right or below."""
        return (self.corner + self.extent > self.size + TOLERANCE).any(1)

    @property
    def empty(self) -> np.ndarray:
        """(N,), those without any area inside their image."""
        end = np.minimum(self.corner + self.extent, self.size)
        return (end - np.maximum(self.corner, 0) <= 0).any(1)

    @property
    def tiny(self) -> np.ndarray:
        """(N,), those within the first pixel of a larger image, where no object is."""
        values = np.concatenate([self.corner, self.extent], 1)
        return (values >= 0).all(1) & (values <= 1).all(1) & (self.size > 2).all(1)


def check_pixels(boxes: Boxes) -> List[str]:
    """
    Returns:
        what is odd of some boxes; of one alone nothing can be told

    Raises:
        ValueError: too many of them are no [x, y, width, height] in pixels
    """
    right = "A bbox is [x, y, width, height] in pixels of its image."
    whole = boxes.some((boxes.extent > 0).all(1))
    reason = len(whole.ids) and _other_unit(whole)
    if reason:
        raise ValueError(f"{reason}. {right}")
    empty, tiny = boxes.empty, whole.tiny
    if empty.mean() > 0.5:
        raise ValueError(
            f"{empty.sum()} of {len(empty)} boxes have no pixel in their image, such as "
            f"{boxes.show(empty)}. {right}"
        )
    notes = []
    if empty.any():
        notes.append(
            f"{empty.sum()} of {len(empty)} boxes have no area inside their image, such as "
            f"{boxes.show(empty)}: training leaves them out, evaluation counts them as objects "
            "that are never found"
        )
    if tiny.any():
        notes.append(
            f"{tiny.sum()} of {len(empty)} boxes lie within 0..1, such as {whole.show(tiny)}: are "
            "they shares of the image and no pixels?"
        )
    return notes


def _other_unit(boxes: Boxes) -> str:
    """What else than pixels the boxes seem to be, and why; "" where nothing speaks for it."""
    corner, extent, size = boxes[1:]
    beyond, tiny = boxes.beyond, boxes.tiny
    if tiny.mean() > 0.5:
        return (
            f"{tiny.sum()} of {len(tiny)} boxes lie within 0..1, such as {boxes.show(tiny)}: they "
            "seem to be shares of the image"
        )
    ordered = (extent >= corner).all(1)  # as two corners are
    corners = ordered & (extent <= size + TOLERANCE).all(1)
    said = f"{beyond.sum()} of {len(beyond)} boxes end beyond their image, such as "
    said += boxes.show(beyond)
    if beyond.mean() > 0.1 and corners[beyond].mean() > 0.95:
        return f"{said}, and would not as [x0, y0, x1, y1]: they seem to be corners"
    half = extent / 2
    centred = (corner - half >= -TOLERANCE) & (corner + half <= size + TOLERANCE)
    if len(beyond) >= ENOUGH and beyond.mean() > 0.1 and centred.all(1).mean() > 0.99:
        return f"{said}, and would not if x, y were the centre: they seem to be centres"
    if beyond.mean() > 0.5:
        return f"{said}: they seem to be of images of another size"
    for full, name in ((100, "percent"), (1000, "thousandths")):
        # Objects of a sound set are not all in the upper left, with the last just below `full`.
        ends = (extent if ordered.mean() > 0.99 else corner + extent).max(0)
        within = (corner >= 0).all() and 0.9 * full < ends.min() and ends.max() <= 1.005 * full
        if len(beyond) >= ENOUGH and within and size.min() > 2 * full:
            first = boxes.show(np.ones(len(beyond), bool))
            return f"all boxes lie within 0..{full}, such as {first}: they seem to be {name}"
    return ""
