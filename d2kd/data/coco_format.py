import logging
import os
from typing import Dict, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from .checks import check_proposals
from .entries import coco_format_entries
from .sets import SetChecks
from .shapes import SPLITS, make_shapes, read_settings

logger = logging.getLogger(__name__)


def register_datasets(
    cfg: CfgNode,
    meta_architecture: str = "",
    parts: Sequence[str] = ("TRAIN", "TEST"),
    draw: bool = True,
) -> None:
    """
    Register every data set of the config with Detectron2, and check it before anything expensive
    is built. It can be called again with the same config.

    1. Register the entries of DATASETS.COCO_FORMAT.
    2. Draw and register the built-in shapes that the config uses. If their settings differ from an
       earlier call, the new ones apply.
    3. Check every data set in DATASETS.TRAIN and DATASETS.TEST: it is registered and its files
       exist; a COCO-format JSON and its images have all that training and evaluation need. All
       sets must have the same classes, as many as the model, where both are known.

    Args:
        cfg: with the keys of :func:`add_data_config`
        meta_architecture: the detector whose number of classes has to fit, such as "RetinaNet";
            empty: MODEL.META_ARCHITECTURE. For a Distiller, that is the student's.
        parts: ("TEST",) skips the training sets, for evaluation without them
        draw: False: only check the settings of the built-in shapes

    Raises:
        ValueError, OSError: naming the config key or file, what is wrong, and what would be right
    """
    for part in parts:
        check_proposals(cfg, part)
    owned: Dict[str, str] = {}  # name of a set -> the config key to blame
    for name, json_file, image_root, key in coco_format_entries(cfg):
        _register(name, json_file, image_root, key)
        owned[name] = key
    for name in dict.fromkeys(x for part in parts for x in cfg.DATASETS[part] if x in SPLITS):
        if draw:
            _register_shapes(name, make_shapes(cfg, SPLITS[name]))
        else:
            read_settings(cfg.DATASETS.SHAPES, SPLITS[name])
        owned[name] = "DATASETS.SHAPES"
    checks = SetChecks(cfg, meta_architecture or cfg.MODEL.META_ARCHITECTURE, owned)
    for part in parts:
        for name in cfg.DATASETS[part]:
            checks.check(name, part, is_there=draw or name not in SPLITS)
    checks.check_together()


def _register(name: str, json_file: str, image_root: str, key: str) -> None:
    if name in SPLITS:
        raise ValueError(f"{key}: NAME {name} is a built-in data set. Take another name.")
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
