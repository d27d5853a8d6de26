"""
The built-in synthetic detection set: shapes of 6 classes on cluttered backgrounds, in COCO's
format, so that d2kd can be tried without a download.

Boxes enclose the visible part, as in COCO; an object is only drawn where MIN_VISIBLE of it stays
visible, so that everything drawn is labelled. With MASKS each has the mask of its visible pixels,
and "area" is the area of the mask, else of the box.
The same settings give the same bytes for the same versions of OpenCV and NumPy.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from typing import Any, Dict, Tuple

import cv2
import numpy as np
import pycocotools.mask

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..utils.checks import check_range
from .drawing import Drawing, draw
from .outlines import CLASSES

logger = logging.getLogger(__name__)

# The index of a split seeds its images, so new splits go to the end.
SPLITS = {"d2kd_shapes_train": "train", "d2kd_shapes_val": "val", "d2kd_shapes_test": "test"}
_NOT_DRAWN = ("ROOT", "NUM_TRAIN", "NUM_VAL", "NUM_TEST")
FORMAT_VERSION = 1  # increase it when the drawing changes, so that old sets are drawn again


def make_shapes(cfg: CfgNode, split: str) -> str:
    """
    Draw a split unless it exists. One process per machine draws while the others wait.

    Args:
        cfg: with the keys of :func:`add_data_config`
        split: "train", "val" or "test"

    Returns:
        the split's folder, with `annotations.json` and `images/`
    """
    settings = read_settings(cfg.DATASETS.SHAPES, split)
    root = cfg.DATASETS.SHAPES.ROOT or os.getenv("DETECTRON2_DATASETS", "datasets")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = os.path.join(os.path.expanduser(root), "d2kd_shapes", f"{split}_{digest}")
    if comm.get_local_rank() == 0 and not os.path.isdir(folder):
        try:
            _write(folder, settings)
        except (OSError, ValueError) as error:
            raise OSError(
                f"DATASETS.SHAPES.ROOT: the set cannot be written to {root!r}: {error}"
            ) from error
    comm.synchronize()
    return folder


def _write(folder: str, settings: Dict[str, Any]) -> None:
    """
    Draw into a temporary folder beside the final one and rename it at the end: a killed process
    leaves no incomplete set, and of two concurrent processes one wins.
    """
    parent = os.path.dirname(folder)
    os.makedirs(parent, exist_ok=True)
    logger.info(f"Drawing {settings['NUM']} images of the built-in shapes into {folder}")
    temporary = tempfile.mkdtemp(prefix=".drawing_", dir=parent)
    try:
        os.chmod(temporary, 0o755)  # mkdtemp's 0o700 would lock out others who share the data
        _draw_all(temporary, settings)
        os.rename(temporary, folder)
    except OSError:
        if not os.path.isdir(folder):
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _draw_all(folder: str, settings: Dict[str, Any]) -> None:
    """Write `images` and `annotations.json` of a split."""
    images, annotations = [], []
    os.mkdir(os.path.join(folder, "images"))
    size, start, logged = settings["IMAGE_SIZE"], time.perf_counter(), time.perf_counter()
    for i in range(settings["NUM"]):
        drawing = draw_one(settings, i)
        name = f"{i:06d}.jpg"
        quality = [cv2.IMWRITE_JPEG_QUALITY, 95]
        if not cv2.imwrite(os.path.join(folder, "images", name), drawing.image, quality):
            raise OSError(f"Cannot write {os.path.join(folder, 'images', name)}")
        images.append({"id": i + 1, "file_name": name, "width": size, "height": size})
        for index, (x0, y0, x1, y1), mask in zip(*drawing[1:]):
            w, h = x1 - x0, y1 - y0
            annotation = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": index + 1}
            annotation.update({"bbox": [x0, y0, w, h], "area": w * h, "iscrowd": 0})
            if settings.get("MASKS"):
                rle = pycocotools.mask.encode(np.asfortranarray(mask, dtype=np.uint8))
                annotation["segmentation"] = {**rle, "counts": rle["counts"].decode()}
                annotation["area"] = int(mask.sum())
            annotations.append(annotation)
        if time.perf_counter() - logged > 10:
            logged = time.perf_counter()
            logger.info(f"Drawn {i + 1} of {settings['NUM']} images")
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    content = {"info": settings, "categories": categories}
    with open(os.path.join(folder, "annotations.json"), "w") as f:
        json.dump({**content, "images": images, "annotations": annotations}, f)
    seconds = time.perf_counter() - start
    logger.info(f"Drew {len(images)} images, {len(annotations)} objects in {seconds:.1f} s")


def draw_one(settings: Dict[str, Any], index: int) -> Drawing:
    """Returns: the :class:`Drawing` of image `index`, independent of all other images."""
    split = list(SPLITS.values()).index(settings["SPLIT"])
    size = settings["IMAGE_SIZE"]
    return draw(
        np.random.default_rng([settings["SEED"], split, index]),
        image_size=size,
        num_objects=(settings["MIN_OBJECTS"], settings["MAX_OBJECTS"]),
        object_size=(settings["MIN_SIZE"], settings["MAX_SIZE"] * size),
        min_visible=settings["MIN_VISIBLE"],
        own_colour=settings["OWN_COLOUR"],
        texture=settings["TEXTURE"],
        clutter=settings["CLUTTER"],
        noise=settings["NOISE"],
        blur=settings["BLUR"],
    )


def read_settings(node: CfgNode, split: str) -> Dict[str, Any]:
    """Returns: all settings that the bytes of a split depend on, after checking their ranges."""
    for key, (low, high) in _ranges(node).items():
        check_range(f"DATASETS.SHAPES.{key}", node[key], low, high)
    settings = {k: v for k, v in node.items() if k not in _NOT_DRAWN}
    if not node.MASKS:  # sets from before there were masks are these
        del settings["MASKS"]
    return {**settings, "NUM": node[f"NUM_{split.upper()}"], "SPLIT": split, "V": FORMAT_VERSION}


def _ranges(node: CfgNode) -> Dict[str, Tuple[float, float]]:
    """Returns: key of DATASETS.SHAPES -> smallest and largest value."""
    return {
        "SEED": (0, 2**32 - 1),
        "NUM_TRAIN": (1, 999999),
        "NUM_VAL": (1, 999999),
        "NUM_TEST": (1, 999999),
        "IMAGE_SIZE": (32, 4096),
        "MAX_OBJECTS": (1, 100),
        "MIN_OBJECTS": (1, node.MAX_OBJECTS),
        "MAX_SIZE": (6 / max(node.IMAGE_SIZE, 1), 1),
        "MIN_SIZE": (6, node.MAX_SIZE * node.IMAGE_SIZE),
        "MIN_VISIBLE": (0.05, 0.9),
        "OWN_COLOUR": (0, 1),
        "TEXTURE": (0, 1),
        "CLUTTER": (0, 1000),
        "NOISE": (0, 255),
        "BLUR": (0, 100),
    }
