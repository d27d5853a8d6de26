"""What of a detector's output becomes an annotation."""

from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from detectron2.structures import Boxes, Instances

from d2kd import load_config
from d2kd.labelling import detect
from d2kd.labelling.inference import Collector
from d2kd.teacher import Teacher

WHOLE = [0.0, 0.0, 60.0, 40.0]


def annotations(
    boxes: Sequence[Sequence[float]],
    scores: Sequence[float],
    classes: Sequence[int],
    thresholds: Optional[Mapping[int, float]] = None,
) -> List[Dict[str, Any]]:
    """Of an image of 60 x 40 pixels; class 0 is category 7, class 2 category 1."""
    found = Instances((40, 60))
    found.pred_boxes = Boxes(torch.tensor(boxes))
    found.scores, found.pred_classes = torch.tensor(scores), torch.tensor(classes)
    collector = Collector({0: 7, 2: 1}, thresholds)
    collector.process([{"image_id": 3, "width": 60, "height": 40}], [{"instances": found}])
    return collector.evaluate()


def test_boxes_are_cut_to_the_image_in_hundredths_of_a_pixel() -> None:
    first, second = annotations([[-5, -3, 70, 50], [1.234, 2.0, 4.5, 6.006]], [0.9, 0.8], [0, 0])
    assert first["bbox"] == WHOLE and first["area"] == 2400
    assert second["bbox"] == [1.23, 2.0, 3.27, 4.01] and second["area"] == 13.11
    assert first["image_id"] == 3 and first["iscrowd"] == 0


@pytest.mark.parametrize("box", [[61, 5, 70, 9], [5, 41, 9, 50], [-9, 5, -1, 9], [5, 5, 5, 9]])
def test_boxes_without_an_area_in_the_image_are_left_out(box: List[float]) -> None:
    assert annotations([box], [0.9], [0]) == []


def test_classes_become_categories_and_those_without_one_are_left_out() -> None:
    found = annotations([WHOLE] * 3, [0.9, 0.8, 0.7], [2, 1, 0])
    assert [(x["category_id"], x["score"]) for x in found] == [(1, 0.9), (7, 0.7)]


def test_score_at_the_threshold_of_its_category_is_kept() -> None:
    scores = [0.123456, 0.123455, 0.999999]
    found = annotations([WHOLE] * 3, scores, [0, 0, 2], thresholds={7: 0.123456})
    assert [x["score"] for x in found] == scores[:1], "no threshold: no label of that class"
    assert len(annotations([WHOLE] * 3, scores, [0, 0, 2])) == 3


@pytest.mark.parametrize("image_format, red", [("RGB", [255, 0, 0]), ("BGR", [0, 0, 255])])
def test_detector_sees_its_own_order_of_channels(
    image_format: str, red: List[int], tmp_path: Path
) -> None:
    seen: List[List[int]] = []

    class Detector(nn.Module):
        def forward(self, inputs: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
            seen.extend(x["image"][:, 0, 0].tolist() for x in inputs)
            found = Instances((8, 8), scores=torch.zeros(0), pred_classes=torch.zeros(0))
            found.pred_boxes = Boxes(torch.zeros(0, 4))
            return [{"instances": found}]

    path = str(tmp_path / "red.png")
    cv2.imwrite(path, np.full((8, 8, 3), (0, 0, 255), dtype=np.uint8))
    image = {"file_name": path, "height": 8, "width": 8, "image_id": 1}
    cfg = load_config(opts=["INPUT.FORMAT", "BGR", "DATALOADER.NUM_WORKERS", 0])
    assert detect(Teacher(Detector(), image_format, {}, ()), [image], cfg, {}) == []
    assert seen == [red]
