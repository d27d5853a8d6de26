"""Small data sets in COCO's format, to be spoilt by the tests."""

import json
from pathlib import Path
from typing import Any, Callable, Dict, List

import cv2
import numpy as np

from detectron2.config import CfgNode, get_cfg

from d2kd.data import add_data_config
from d2kd.data.coco_parts import ImageEntry

Content = Dict[str, Any]
NAMES = ("cat", "dog")


def content(count: int = 8) -> Content:
    """Of images of 64 x 48 pixels with three boxes of some size each."""
    drawn = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(1, count + 1):
        images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 48})
        for _ in range(3):
            width, height = drawn.integers(6, 40, 2).tolist()
            x, y = int(drawn.integers(0, 64 - width)), int(drawn.integers(0, 48 - height))
            annotation = {"id": len(annotations) + 1, "image_id": i, "category_id": 1 + i % 2}
            annotation.update(bbox=[x, y, width, height], area=width * height, iscrowd=0)
            annotations.append(annotation)
    categories = [{"id": i, "name": x} for i, x in enumerate(NAMES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_set(folder: Path, name: str, change: Callable[[Content], Any] = lambda x: None) -> str:
    """
    Write `name`.json and, under `name`, its images.

    Args:
        change: spoils what the JSON says

    Returns:
        path of the JSON
    """
    said = content()
    (folder / name).mkdir(parents=True)
    drawn = np.random.default_rng(1)
    for image in said["images"]:
        pixels = drawn.integers(0, 255, (image["height"], image["width"], 3), dtype=np.uint8)
        cv2.imwrite(str(folder / name / image["file_name"]), pixels)
    change(said)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(said))
    return str(path)


def config_of(folder: Path, train: List[str], test: List[str]) -> CfgNode:
    """Of a RetinaNet on sets that write_set wrote."""
    cfg = get_cfg()
    add_data_config(cfg)
    return name_sets(cfg, folder, train, test)


def name_sets(cfg: CfgNode, folder: Path, train: List[str], test: List[str]) -> CfgNode:
    """The config, on sets that write_set wrote."""
    for name in dict.fromkeys(train + test):
        paths = {"JSON": str(folder / f"{name}.json"), "IMAGES": str(folder / name)}
        cfg.DATASETS.COCO_FORMAT.append({"NAME": name, **paths})
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RETINANET.NUM_CLASSES = len(NAMES)
    return cfg


def second(part: str, **values: Any) -> Callable[[Content], None]:
    """Changes the second entry of a part."""
    return lambda said: said[part][1].update(values)


def every(part: str, change: Callable[[Dict[str, Any]], Any]) -> Callable[[Content], None]:
    """Changes all entries of a part."""

    def apply(said: Content) -> None:
        for entry in said[part]:
            change(entry)

    return apply


def read_entries(json_file: Path) -> List[ImageEntry]:
    said = json.loads(json_file.read_text())
    return [ImageEntry(x["file_name"], x["width"], x["height"]) for x in said["images"]]
