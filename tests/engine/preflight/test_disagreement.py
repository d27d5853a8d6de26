"""Where teacher and labels disagree is told before the first step."""

import json
import re
from pathlib import Path
from typing import Any, Dict, List

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from d2kd.engine.preflight.disagreement import tell_disagreement

BOX, ELSEWHERE = [10, 10, 20, 20], [50, 50, 20, 20]


@pytest.fixture
def images(tmp_path: Path) -> List[Dict[str, Any]]:
    for i in range(3):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.zeros((80, 80, 3), dtype=np.uint8))
    return [{"image_id": i, "file_name": str(tmp_path / f"{i}.png")} for i in range(3)]


def annotation(image: int, category: int, box: List[int], **values: Any) -> Dict[str, Any]:
    place = {"image_id": image, "category_id": category, "bbox": box}
    return {**place, "area": 400, "iscrowd": 0, **values}


def truth_of(*annotations: Dict[str, Any]) -> COCO:
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": 80, "width": 80} for i in range(4)],
        "categories": [{"id": k, "name": x} for k, x in ((1, "cat"), (5, "dog"), (7, "cow"))],
        "annotations": [{**x, "id": i} for i, x in enumerate(annotations, 1)],
    }
    truth.createIndex()
    return truth


def test_errors_of_each_class_are_counted_and_the_worst_images_written(
    images: List[Dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truth = truth_of(
        *(annotation(i, 1, BOX) for i in range(3)),
        annotation(3, 1, BOX),  # of an image that was not looked at
        annotation(0, 5, BOX),
        annotation(0, 7, BOX),  # of a class that is not compared
    )
    found = [
        annotation(0, 1, BOX, score=0.9),
        annotation(1, 1, ELSEWHERE, score=0.8),
        annotation(1, 1, BOX, score=0.7),
        annotation(2, 1, ELSEWHERE, score=0.1),
    ]
    path = str(tmp_path / "run" / "teacher_worst")
    with caplog.at_level("INFO", logger="d2kd"):
        rows = tell_disagreement(truth, images, found, [1, 5], path)
    # F1 of the cat from 0.9, 0.8, 0.7 and 0.1 on: 2/4, 2/5, 4/6, 4/7. From 0.7 on, one of three
    # is missed, and one of three detections is none. Of the dog there is no detection.
    assert rows == [["cat", 3, "0.70", 1, 1], ["dog", 1, "-", 1, 0]]
    assert re.search(r"\nall +4 +2 +1\n", caplog.text)
    worst = json.loads(Path(f"{path}.json").read_text())
    # Also where the dog is, of which no score is there to choose one from.
    assert [Path(x["file_name"]).name for x in worst] == ["0.png", "1.png", "2.png"]
    assert [[len(x[k]) for k in ("misses", "false_alarms")] for x in worst[:2]] == [[1, 0], [0, 1]]
    assert worst[0]["misses"] == [{"class": "dog", "bbox": BOX}]
    assert cv2.imread(f"{path}.png").shape[1] > 600


def test_perfect_teacher_has_no_worst_image(images: List[Dict[str, Any]], tmp_path: Path) -> None:
    truth = truth_of(annotation(0, 1, BOX))
    found = [annotation(0, 1, BOX, score=0.9)]
    rows = tell_disagreement(truth, images, found, [1, 5, 7], str(tmp_path / "x"))
    assert rows == [["cat", 1, "0.90", 0, 0]]
    assert not list(tmp_path.glob("x*"))


def test_picture_that_cannot_be_written_is_not_told_as_written(
    images: List[Dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.png").mkdir()
    truth, found = truth_of(annotation(0, 1, BOX)), [annotation(1, 1, BOX, score=0.9)]
    with pytest.raises(OSError, match="Cannot write .*x.png"):
        tell_disagreement(truth, images, found, [1], str(tmp_path / "x"))
    assert "Where they disagree most" not in caplog.text
