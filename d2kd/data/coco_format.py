import difflib
import logging
import os
from typing import Any, Dict, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from .checks import (
    check_class_names,
    check_files,
    check_json,
    check_num_classes,
    check_proposals,
)
from .shapes import SPLITS, make_shapes

logger = logging.getLogger(__name__)

ENTRY_KEYS = ("NAME", "JSON", "IMAGES")


def register_datasets(
    cfg: CfgNode, meta_architecture: str = "", parts: Sequence[str] = ("TRAIN", "TEST")
) -> None:
    """
    Make every data set that the config names known to Detectron2, and check it before anything
    expensive is built. Calling it again with the same config is fine.

    1. Register the entries of DATASETS.COCO_FORMAT.
    2. Draw and register the built-in shapes where they are named. Other settings of the shapes
       than in an earlier call replace the earlier ones.
    3. Check every name in DATASETS.TRAIN and DATASETS.TEST: registered, files there, and for the
       sets of 1. and 2. also that the JSON is COCO's format and the first images exist.
       The number of classes must be that of the model, where both are known.

    Args:
        cfg: with the keys of :func:`add_data_config`
        meta_architecture: the detector whose number of classes has to fit, such as "RetinaNet";
            empty: MODEL.META_ARCHITECTURE. For a Distiller, that is the student's.
        parts: ("TEST",) leaves the training sets alone, for evaluation without them
    """
    for part in parts:
        check_proposals(cfg, part)
    owned = {}  # name -> the config key to blame, for the sets that are registered here
    for i, entry in enumerate(cfg.DATASETS.COCO_FORMAT):
        key = f"DATASETS.COCO_FORMAT[{i}]"
        name, json_file, image_root = parse_entry(entry, key)
        _register(name, json_file, image_root, key)
        owned[name] = key
    names = [(name, f"DATASETS.{part}") for part in parts for name in cfg.DATASETS[part]]
    for name in dict.fromkeys(name for name, _ in names if name in SPLITS):
        folder = make_shapes(cfg, SPLITS[name])
        _register_shapes(name, folder)
        owned[name] = "DATASETS.SHAPES"

    known = None
    for name, key in names:
        if name not in DatasetCatalog.list():
            near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
            hint = f"Did you mean {' or '.join(near)}?" if near else "Is it in COCO_FORMAT?"
            raise ValueError(f"{key}: no data set is registered as {name!r}. {hint}")
        metadata = MetadataCatalog.get(name)
        check_files(metadata, owned.get(name, key))
        classes = metadata.get("thing_classes")
        if name in owned:
            classes = check_json(metadata.json_file, metadata.image_root, owned[name])
        if classes is not None:
            known = known or (name, classes)
            check_num_classes(cfg, meta_architecture or cfg.MODEL.META_ARCHITECTURE, name, classes)
            check_class_names(name, classes, *known)


def parse_entry(entry: Dict[str, Any], key: str) -> Tuple[str, str, str]:
    """Returns: NAME, JSON and IMAGES of one entry of DATASETS.COCO_FORMAT."""
    if not isinstance(entry, dict):
        raise ValueError(f"{key}: must be a mapping with {', '.join(ENTRY_KEYS)}, got {entry!r}")
    for k in entry:
        if k not in ENTRY_KEYS:
            near = difflib.get_close_matches(str(k).upper(), ENTRY_KEYS, n=1, cutoff=0)[0]
            raise ValueError(f"{key}: unknown key {k!r} in {dict(entry)}. Did you mean {near}?")
    for k in ENTRY_KEYS:
        if not isinstance(entry.get(k), str) or not entry[k]:
            raise ValueError(f"{key}: {k} must be a non-empty string, got {dict(entry)}")
    return entry["NAME"], os.path.expanduser(entry["JSON"]), os.path.expanduser(entry["IMAGES"])


def _register(name: str, json_file: str, image_root: str, key: str) -> None:
    if name in SPLITS:
        raise ValueError(f"{key}: NAME {name} belongs to the built-in set, take another")
    if name not in DatasetCatalog.list():
        register_coco_instances(name, {}, json_file, image_root)
        return
    known = MetadataCatalog.get(name)
    known = (known.get("json_file"), known.get("image_root"))
    if known != (json_file, image_root):
        raise ValueError(
            f"{key}: NAME {name} is already registered with JSON {known[0]} and IMAGES {known[1]},"
            f" got {json_file} and {image_root}. Take another name."
        )


def _register_shapes(name: str, folder: str) -> None:
    json_file = os.path.join(folder, "annotations.json")
    if name in DatasetCatalog.list():
        if MetadataCatalog.get(name).json_file == json_file:
            return
        logger.info(f"{name} is now {folder}")
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, json_file, os.path.join(folder, "images"))
