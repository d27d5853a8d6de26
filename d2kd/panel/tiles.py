"""Drawing of maps: coloured cells, boxes and text. All pictures are RGB, uint8."""

import math
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple, Union

import cv2
import numpy as np

from .maps import Map

TILE = 224  # longer side of a map, pixels
LINE = 18  # height of a line of text
GAP = 8  # between tiles
FONT, FONT_SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.4
WHITE, BLACK, GREY = (255, 255, 255), (0, 0, 0), (110, 110, 110)
# Colours of a boolean map: False (hidden), True
TWO_COLOURS = np.array([(24, 28, 58), (250, 214, 102)], dtype=np.uint8)


def map_tile(map: Map, size: Tuple[int, int], boxes: np.ndarray) -> np.ndarray:
    """
    Args:
        size: (height, width) of the image in input pixels
        boxes: boxes to outline, (M, 4) XYXY in input pixels

    Returns:
        (H, TILE, 3): title, range of values (for a boolean map the share of True), and the cells
        inside the image
    """
    inside = map.values[: math.ceil(size[0] / map.cell), : math.ceil(size[1] / map.cell)]
    if inside.dtype == bool:
        colours, note = TWO_COLOURS[inside.astype(int)], f"{inside.mean():.0%}"
    else:
        low, high = float(inside.min()), float(inside.max())
        # A constant map, such as a single cell, gets the middle colour.
        shade = (inside - low) / (high - low) if low < high else np.full(inside.shape, 0.5)
        colours = _colour(shade, map.colours)
        note = f"{low:.3g} to {high:.3g}" if low < high else f"{low:.3g}"
    picture = outline(_spread(colours, map.cell, size), boxes, TILE / max(size))
    title = text_line(map.title)[:, :TILE]
    tile = join([title, text_line(note, GREY), picture], axis=0, gap=0)
    return np.pad(tile, [(0, 0), (0, TILE - tile.shape[1]), (0, 0)], constant_values=255)


def _spread(colours: np.ndarray, cell: int, size: Tuple[int, int]) -> np.ndarray:
    """Cells, (Hi, Wi, 3), as squares at their place in the image, cut at its border."""
    scale = TILE / max(size)
    rows, columns = (
        np.minimum((np.arange(max(round(pixels * scale), 1)) / scale / cell).astype(int), cells - 1)
        for pixels, cells in zip(size, colours.shape)
    )
    return colours[rows][:, columns]


def _colour(shade: np.ndarray, colours: int) -> np.ndarray:
    """(H, W) from 0 to 1 -> (H, W, 3)"""
    return cv2.applyColorMap((shade * 255).astype(np.uint8), colours)[..., ::-1]


def colour_bar(colours: int) -> np.ndarray:
    """One of cv2's colormaps from its lowest to its highest value, as high as a line of text."""
    return _colour(np.tile(np.linspace(0, 1, 3 * LINE), (LINE, 1)), colours)


def two_colours() -> np.ndarray:
    """The colours of False and True, as high as a line of text."""
    return TWO_COLOURS[np.repeat([[0, 1]], LINE, axis=0)].repeat(3 * LINE // 2, axis=1)


def resize(image: np.ndarray, longer_side: int) -> np.ndarray:
    scale = longer_side / max(image.shape[:2])
    height, width = (max(round(x * scale), 1) for x in image.shape[:2])
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=interpolation)


def outline(picture: np.ndarray, boxes: np.ndarray, scale: float) -> np.ndarray:
    """A copy with boxes, (M, 4) XYXY before scaling, in white on black, visible on any colour."""
    picture = np.array(picture, order="C")
    for x0, y0, x1, y1 in (boxes * scale).astype(int).tolist():
        cv2.rectangle(picture, (x0 - 1, y0 - 1), (x1, y1), BLACK)
        cv2.rectangle(picture, (x0, y0), (x1 - 1, y1 - 1), WHITE)
    return picture


def annotate(
    image: np.ndarray, annotations: List[Dict[str, Any]], names: Dict[int, str], zoom: float
) -> np.ndarray:
    """
    Args:
        image: (H, W, 3) uint8, already enlarged by `zoom`, unlike the boxes
        annotations: COCO's, boxes XYWH
        names: category id -> class name

    Returns:
        (H, W, 3), a copy with boxes and class names
    """
    image = image.copy()
    for annotation in annotations:
        x, y, w, h = (int(v * zoom) for v in annotation["bbox"])
        name = names[annotation["category_id"]]
        cv2.rectangle(image, (x, y), (x + w - 1, y + h - 1), WHITE, 1)
        (text_width, _), _ = cv2.getTextSize(name, FONT, 0.4, 1)
        # Above the box, because inside it the label would hide a small object.
        left, top = min(x, image.shape[1] - text_width - 4), max(y - 14, 0)
        cv2.rectangle(image, (left, top), (left + text_width + 4, top + 14), WHITE, -1)
        cv2.putText(image, name, (left + 2, top + 11), FONT, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return image


def write_picture(path: Union[str, Path], picture: np.ndarray) -> None:
    """
    Write a picture in the format of its name, such as a.png.

    Raises:
        OSError: it cannot be written
    """
    content = cv2.imencode(Path(path).suffix, picture[..., ::-1])[1]
    try:  # not by cv2.imwrite, which ends the process at a name that is not UTF-8
        Path(path).write_bytes(content)
    except OSError as error:
        raise OSError(f"Cannot write {path}: {error.strerror}") from error


def blank(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 255, dtype=np.uint8)


def text_line(text: str, colour: Tuple[int, int, int] = BLACK) -> np.ndarray:
    """(LINE, width of the text, 3)"""
    # OpenCV ends the process at what is not UTF-8, as the name of a file may be.
    text = text.encode(errors="replace").decode()
    line = blank(LINE, cv2.getTextSize(text, FONT, FONT_SCALE, 1)[0][0] + 2)
    cv2.putText(line, text, (0, LINE - 6), FONT, FONT_SCALE, colour, 1, cv2.LINE_AA)
    return line


def join(pictures: Sequence[np.ndarray], axis: int, gap: int = GAP) -> np.ndarray:
    """Stack pictures from top to bottom (axis 0) or left to right (axis 1), on white."""
    longest = max(x.shape[1 - axis] for x in pictures)
    padded = []
    for i, picture in enumerate(pictures):
        pad = [(0, 0), (0, 0), (0, 0)]
        pad[axis] = (gap if i else 0, 0)
        pad[1 - axis] = (0, longest - picture.shape[1 - axis])
        padded.append(np.pad(picture, pad, constant_values=255))
    return np.concatenate(padded, axis)
