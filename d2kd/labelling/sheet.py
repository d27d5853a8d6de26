"""The images on which detector and labels disagree most, as a list and a contact sheet."""

import os
from typing import Any, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from detectron2.data.detection_utils import read_image
from detectron2.utils.visualizer import Visualizer

from ..panel.tiles import GAP, join, resize, text_line, write_picture
from ..utils.atomic_file import write_json
from .inference import Annotation
from .thresholds import Gate
from .worst import ImageErrors, list_worst, worst_images

SIDE, COLUMNS = 320, 4  # longer side of an image, pixels; images in a row
# RGB, 0..255, of three kinds that the colour-blind can tell apart
FOUND, MISS, FALSE_ALARM = (86, 180, 233), (240, 228, 66), (213, 94, 0)


def write_worst(
    gates: Sequence[Gate], images: Sequence[Mapping[str, Any]], most: int, path: str
) -> bool:
    """
    Write PATH.json and PATH.png.

    Args:
        images: in Detectron2's format
        most: number of images
        path: without extension

    Returns:
        False: there are none, and nothing is written
    """
    worst = worst_images(gates, most)
    if worst:
        files = {x["image_id"]: x["file_name"] for x in images}
        names = {x.category_id: x.name for x in gates}
        write_json(f"{path}.json", list_worst(worst, files, names))
        write_picture(f"{path}.png", draw_sheet(worst, files, names))
    return bool(worst)


def draw_sheet(
    worst: List[ImageErrors], files: Mapping[int, str], names: Mapping[int, str]
) -> np.ndarray:
    """
    Args:
        worst: one or more
        files: path of each image, by id
        names: of the classes, by category id

    Returns:
        (H, W, 3) uint8, RGB
    """
    tiles = [_tile(x, files[x.image_id], names) for x in worst]
    rows = [join(tiles[i : i + COLUMNS], axis=1) for i in range(0, len(tiles), COLUMNS)]
    colours = (("labels that are found", FOUND), ("misses", MISS), ("false alarms", FALSE_ALARM))
    legend = [x for text, colour in colours for x in (_swatch(colour), text_line(text))]
    sheet = join([join(legend, axis=1), *rows], axis=0)
    return np.pad(sheet, [(GAP, GAP), (GAP, GAP), (0, 0)], constant_values=255)


def _swatch(colour: Tuple[int, int, int]) -> np.ndarray:
    line = text_line("      ")
    line[2:-2] = colour
    return line


def _tile(errors: ImageErrors, path: str, names: Mapping[int, str]) -> np.ndarray:
    image = read_image(path, "RGB")
    sides = image.shape[:2]
    # At least a pixel of the shorter side: matplotlib draws no picture without one.
    picture = Visualizer(image, scale=max(SIDE / max(sides), 1 / min(sides)))
    missed = {x["id"] for x in errors.misses}
    _draw(picture, [x for x in errors.truth if x["id"] not in missed], FOUND)
    _draw(picture, errors.misses, MISS, [names[x["category_id"]] for x in errors.misses])
    texts = [f"{names[x['category_id']]} {x['score']:.2f}" for x in errors.false_alarms]
    _draw(picture, errors.false_alarms, FALSE_ALARM, texts)
    told = f"{len(errors.misses)} missed, {len(errors.false_alarms)} false"
    caption = text_line(f"{told}: {os.path.basename(path)}")[:, :SIDE]
    return join([caption, resize(picture.output.get_image(), SIDE)], axis=0, gap=0)


def _draw(
    picture: Visualizer,
    annotations: List[Annotation],
    colour: Tuple[int, int, int],
    texts: Optional[List[str]] = None,
) -> None:
    boxes = np.array([x["bbox"] for x in annotations], dtype=float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    colours = [tuple(x / 255 for x in colour)] * len(annotations)
    picture.overlay_instances(boxes=boxes, labels=texts, assigned_colors=colours)
