"""Class names of a detector, read from its config's data sets."""

import os
from typing import Dict, Mapping, Optional, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from .coco_json import read_classes
from .entries import coco_format_entries
from .outlines import CLASSES
from .shapes import SPLITS


def class_names(cfg: CfgNode) -> Tuple[str, ...]:
    """
    Class names of a detector with this config, in order. No data set is registered.

    Raises:
        ValueError: an invalid entry of DATASETS.COCO_FORMAT, or one whose JSON is not COCO's
    """
    return names_in_sets([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST], coco_json_files(cfg))


def coco_json_files(cfg: CfgNode) -> Dict[str, str]:
    """Data set name -> JSON, for the entries of DATASETS.COCO_FORMAT."""
    return {name: json_file for name, json_file, *_ in coco_format_entries(cfg)}


def names_in_sets(
    datasets: Sequence[str], json_files: Optional[Mapping[str, str]] = None
) -> Tuple[str, ...]:
    """
    Class names of the first data set whose names are known; () if there is none.

    Args:
        json_files: name -> JSON of data sets that may not be registered
    """
    json_files = json_files or {}
    found = (_names(x, json_files.get(x, "")) for x in datasets)
    return next((x for x in found if x), ())


def _names(dataset: str, json_file: str) -> Tuple[str, ...]:
    if json_file:
        return _in_json(json_file, dataset)
    if dataset in SPLITS:
        return tuple(CLASSES)
    if dataset not in DatasetCatalog.list():  # MetadataCatalog.get would create an entry
        return ()
    metadata = MetadataCatalog.get(dataset)
    # Detectron2 knows the names of a COCO set only once it has read the annotations.
    return tuple(metadata.get("thing_classes") or _in_json(metadata.get("json_file"), dataset))


def _in_json(path: Optional[str], dataset: str) -> Tuple[str, ...]:
    return read_classes(path, f"Data set {dataset}") if path and os.path.isfile(path) else ()
