"""The images with most errors, as a list and as a picture."""

from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import cv2
import numpy as np
import pytest

from d2kd.labelling import ClassMatches, Gate
from d2kd.labelling.sheet import FALSE_ALARM, FOUND, MISS, draw_sheet
from d2kd.labelling.worst import ImageErrors, list_worst, worst_images
from d2kd.panel.tiles import GAP

NAMES = {1: "cat", 2: "dog"}


def entry(number: int, image: int, category: int, **values: Any) -> Dict[str, Any]:
    place = {"id": number, "image_id": image, "category_id": category}
    return {**place, "bbox": [5, 5, 20, 10], **values}


def gate(category: int, threshold: Optional[float]) -> Gate:
    """Image 1 has a miss; image 2 a miss and a false alarm; image 3 neither."""
    detections: List[Dict[str, Any]] = [
        entry(1, 3, category, score=0.9),
        entry(2, 2, category, score=0.8),
        entry(3, 1, category, score=0.1),
    ]
    truth = [entry(10 * category + image, image, category) for image in (1, 2, 3)]
    found_with = np.array([0.1, -np.inf, 0.9])
    matches = ClassMatches(detections, np.array([True, False, True]), truth, found_with)
    return Gate(category, NAMES[category], matches, threshold, 0.5, 0.3, 2)


def test_most_errors_come_first_and_images_without_are_left_out() -> None:
    worst = worst_images([gate(1, 0.5), gate(2, 0.5)], 5)
    assert [(x.image_id, x.count) for x in worst] == [(2, 4), (1, 2)]
    assert worst_images([gate(1, 0.5)], 1)[0].image_id == 2


def test_a_class_without_labels_does_not_count() -> None:
    worst = worst_images([gate(1, 0.5), gate(2, None)], 5)
    assert [(x.image_id, x.count) for x in worst] == [(2, 2), (1, 1)]
    assert worst_images([gate(1, None)], 5) == []


def test_the_list_names_files_classes_and_scores() -> None:
    files = {1: "a.png", 2: "b.png"}
    first, second = list_worst(worst_images([gate(1, 0.5)], 5), files, NAMES)
    miss = {"class": "cat", "bbox": [5, 5, 20, 10]}
    assert first == {
        "file_name": "b.png",
        "image_id": 2,
        "misses": [miss],
        "false_alarms": [{**miss, "score": 0.8}],
    }
    assert second["file_name"] == "a.png" and second["false_alarms"] == []


def test_every_image_has_a_place_on_the_sheet(tmp_path: Path) -> None:
    count, path = 5, str(tmp_path / "a.png")
    cv2.imwrite(path, np.zeros((40, 60, 3), dtype=np.uint8))
    worst = worst_images([gate(1, 0.5)], 1) * count
    sheet = draw_sheet(worst, {2: path}, NAMES)
    assert sheet.dtype == np.uint8
    dark = (sheet.max(axis=2) < 30).sum()
    area = 320 * 213  # of an image
    assert 0.7 * count * area < dark < count * area


def test_boxes_are_where_they_are_in_the_colour_of_their_kind(tmp_path: Path) -> None:
    path = str(tmp_path / "a.png")
    cv2.imwrite(path, np.zeros((240, 320, 3), dtype=np.uint8))
    left = {FOUND: 20, MISS: 120, FALSE_ALARM: 220}
    boxes = [entry(i, 2, 1, bbox=[x, 60, 40, 100], score=0.5) for i, x in enumerate(left.values())]
    sheet = draw_sheet([ImageErrors(2, boxes[:2], boxes[1:2], boxes[2:])], {2: path}, NAMES)
    row = sheet[-240 - GAP + 130, GAP : GAP + 320].astype(int)  # below the texts
    for colour, x in left.items():
        # Lines are drawn half transparent.
        near = np.flatnonzero(np.abs(2 * row - colour).max(axis=1) < 60)
        assert near[0] == pytest.approx(x, abs=3) and near[-1] == pytest.approx(x + 40, abs=3)


@pytest.mark.parametrize("size", [(8, 6000), (6000, 8)])
def test_an_image_as_thin_as_a_line_is_drawn(size: Tuple[int, int], tmp_path: Path) -> None:
    path = str(tmp_path / "a.png")  # scaled to 320 pixels, the other side is less than half a pixel
    cv2.imwrite(path, np.zeros((*size, 3), dtype=np.uint8))
    sheet = draw_sheet(worst_images([gate(1, 0.5)], 1), {2: path}, NAMES)
    assert max(sheet.shape) >= 320
