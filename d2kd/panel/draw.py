"""Draw the maps of a distillation step as one image."""

import os
from typing import List, Sequence, Tuple

import cv2
import numpy as np
import torch

from detectron2.data.detection_utils import convert_image_to_rgb

from ..distiller import Distiller
from ..views import DetectorView
from .maps import ENERGIES, WEIGHTS, image_maps
from .tiles import (
    GAP,
    TILE,
    annotate,
    blank,
    colour_bar,
    join,
    map_tile,
    outline,
    resize,
    text_line,
    two_colours,
)


@torch.no_grad()
def draw_panel(distiller: Distiller, index: int = 0, class_names: Sequence[str] = ()) -> np.ndarray:
    """
    Draw one image of the latest batch: its ground truth, then for each level pair the teacher's
    attention, the maps recorded by the heads (masks), and the energies of teacher and student; of
    several teachers, one after the other.

    Args:
        distiller: after a forward pass in training mode, with a teacher
        index: index of the image in the batch
        class_names: names of the ground-truth classes; classes without one are drawn as numbers

    Returns:
        (H, W, 3) uint8, RGB

    Raises:
        ValueError: there was no such forward pass
    """
    if distiller.last_step is None:
        raise ValueError("Nothing to draw: run a training forward pass with a teacher first.")
    view = distiller.last_step.student
    size, (boxes, _) = view.image_sizes[index], _objects(view, index)
    picture = _ground_truth(distiller, index, class_names)
    rows = [join([picture, _legend(distiller, index)], axis=1, gap=2 * GAP)]
    for i, lesson in enumerate(distiller.lessons):
        if lesson.name:
            rows.append(text_line(f"Teacher {lesson.name}"))
        for row in image_maps(distiller, index, i):
            tiles = [blank(1, TILE) if x is None else map_tile(x, size, boxes) for x in row]
            rows.append(join(tiles, axis=1))
    panel = join(rows, axis=0)
    return cv2.copyMakeBorder(panel, *[GAP] * 4, cv2.BORDER_CONSTANT, value=(255,) * 3)


def _objects(view: DetectorView, index: int) -> Tuple[np.ndarray, List[int]]:
    """Boxes and classes of an image; none where it has no labels."""
    if "instances" not in view.batched_inputs[index]:
        return np.zeros((0, 4)), []
    objects = view.gt_instances[index]
    return objects.gt_boxes.tensor.cpu().numpy(), objects.gt_classes.tolist()


def _ground_truth(distiller: Distiller, index: int, names: Sequence[str]) -> np.ndarray:
    """The student's input image, enlarged, with boxes and class names."""
    view = distiller.last_step.student
    image = view.batched_inputs[index]["image"].permute(1, 2, 0)
    image = convert_image_to_rgb(image, distiller.image_format).clip(0, 255).astype(np.uint8)
    scale = 2 * TILE / max(image.shape[:2])
    boxes, classes = _objects(view, index)
    picture = outline(resize(image, 2 * TILE), boxes, scale)
    annotations = [
        {"bbox": [x0, y0, x1 - x0, y1 - y0], "category_id": k}
        for k, (x0, y0, x1, y1) in zip(classes, boxes)
    ]
    known = {k: names[k] if k < len(names) else str(k) for k in classes}
    return annotate(picture, annotations, known, scale)


def _legend(distiller: Distiller, index: int) -> np.ndarray:
    sample = distiller.last_step.student.batched_inputs[index]
    height, width = sample["image"].shape[-2:]
    keys = [
        (colour_bar(WEIGHTS), "attention: where the teacher responds, mean 1; weights of a head"),
        (colour_bar(ENERGIES), "energy: mean magnitude over channels"),
        (two_colours(), "masks: light is True, and the percentage is its share of the cells"),
    ]
    count = f"{len(sample['instances'])} objects" if "instances" in sample else "no labels"
    lines = [
        text_line(os.path.basename(sample.get("file_name", ""))),
        text_line(f"{width} x {height} pixels, {count}"),
        *(join([colours, text_line(meaning)], axis=1) for colours, meaning in keys),
        text_line("Each map has a scale of its own, from its lowest to its highest value."),
    ]
    return join(lines, axis=0)
