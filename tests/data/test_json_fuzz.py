"""Whatever a JSON says, it is refused by its path or trained and evaluated on to the end."""

import copy
import json
import random
from pathlib import Path
from typing import Any, Dict

import pytest
import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from d2kd.data import register_datasets
from d2kd.data.mapper import CheckedMapper
from d2kd.engine.evaluator import CompleteCOCOEvaluator
from tests.helpers.toy_sets import Content, config_of, content, every, write_set

pytestmark = pytest.mark.fuzz

NAN, INF = float("nan"), float("inf")
VALUES = [None, True, False, 0, -1, 1, 2, 1.5, NAN, INF, 1e308, 10**30, "", "x", "1", [], {}, [1]]
VALUES += [[[1, 2, 3, 4, 5, 6]], [[1, 2]], [["a"]], [1, 2, 3, 4], [0, 0, 0, 0], [-5, -5, 3, 3]]
VALUES += [{"counts": x, "size": [48, 64]} for x in ("x", [0, 3072], "PPYo0")]
KEYS: Dict[str, str] = {
    "images": "id file_name width height license",
    "annotations": "id image_id category_id bbox area iscrowd segmentation keypoints ignore",
    "categories": "id name supercategory",
    "": "info licenses images annotations categories",
}


def spoil(said: Content, drawn: random.Random) -> None:
    part = drawn.choice(list(KEYS))
    key, value = drawn.choice(KEYS[part].split()), drawn.choice(VALUES)
    entries = said[part] if part else [said]
    for entry in entries if drawn.random() < 0.2 else [drawn.choice(entries)]:
        if drawn.random() < 0.2:
            entry.pop(key, None)
        else:
            entry[key] = copy.deepcopy(value)


def evaluate(cfg: CfgNode, name: str, masks: bool) -> float:
    """AP of detections that are the boxes themselves, after training's mapper has read all."""
    images, mapper = DatasetCatalog.get(name), CheckedMapper(cfg, is_train=True)
    tasks = ("bbox", "segm") if masks else ("bbox",)
    evaluator = CompleteCOCOEvaluator(name, tasks=tasks, distributed=False)
    evaluator.reset()
    for image in images:
        mapper(image)
        found = Instances((image["height"], image["width"]))
        boxes = torch.tensor([x["bbox"] for x in image["annotations"]]).float().reshape(-1, 4)
        found.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
        found.scores = torch.linspace(0.9, 0.5, len(boxes))
        found.pred_classes = torch.tensor([x["category_id"] for x in image["annotations"]]).long()
        if masks:
            found.pred_masks = torch.ones(len(boxes), *found.image_size, dtype=torch.bool)
        evaluator.process([image], [{"instances": found}])
    return evaluator.evaluate()["bbox"]["AP"]


def add_mask(annotation: Dict[str, Any]) -> None:
    x, y, width, height = annotation["bbox"]
    annotation["segmentation"] = [[x, y, x + width, y, x + width, y + height]]


@pytest.mark.parametrize("masks", [False, True])
def test_any_json_is_refused_by_its_path_or_serves_to_the_end(
    masks: bool, tmp_path: Path, forget_sets: None
) -> None:
    write_set(tmp_path, "base")
    drawn, served = random.Random(int(masks)), 0
    for i in range(60):
        said, path = content(count=4), tmp_path / f"set_{i}.json"
        if masks:
            every("annotations", add_mask)(said)
        spoil(said, drawn)
        path.write_text(json.dumps(said))
        cfg = config_of(tmp_path, [path.stem], [path.stem])
        cfg.DATASETS.COCO_FORMAT[0]["IMAGES"] = str(tmp_path / "base")
        cfg.MODEL.MASK_ON, cfg.MODEL.DEVICE = masks, "cpu"
        try:
            register_datasets(cfg)
        except (ValueError, OSError) as error:
            # Of a class that is gone, the number of classes is told.
            assert str(path) in str(error) or "NUM_CLASSES" in str(error), error
            continue
        # A box without area is told, and counts as not found.
        assert evaluate(cfg, path.stem, masks) > 70, said
        served += 1
    assert served > 10
