"""What the classes of a detector are called, told by the data sets in its config."""

import os
from typing import Mapping, Optional, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from .checks import read_summary
from .coco_format import parse_entry
from .outlines import CLASSES
from .shapes import SPLITS


def class_names(cfg: CfgNode) -> Tuple[str, ...]:
    """
    Names of the classes that a detector of this config learns, in their order. No data set is
    registered for it.

    Raises:
        ValueError: an entry of DATASETS.COCO_FORMAT that is none, or whose JSON is not COCO's
    """
    entries = [
        parse_entry(entry, f"DATASETS.COCO_FORMAT[{i}]")
        for i, entry in enumerate(cfg.DATASETS.COCO_FORMAT)
    ]
    json_files = {name: json_file for name, json_file, _ in entries}
    return names_in_sets([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST], json_files)


def names_in_sets(
    datasets: Sequence[str], json_files: Optional[Mapping[str, str]] = None
) -> Tuple[str, ...]:
    """
    Class names of the first data set of which they are known; () where there is none.

    Args:
        json_files: of sets that may not be registered, by name
    """
    json_files = json_files or {}
    found = (_names(x, json_files.get(x, "")) for x in datasets)
    return next((x for x in found if x), ())


def _names(dataset: str, json_file: str) -> Tuple[str, ...]:
    if json_file:
        return _in_json(json_file, dataset)
    if dataset in SPLITS:
        return tuple(CLASSES)
    if dataset not in DatasetCatalog.list():  # asking for its metadata would make some
        return ()
    metadata = MetadataCatalog.get(dataset)
    # Detectron2 reads those of a COCO set together with its annotations.
    return tuple(metadata.get("thing_classes") or _in_json(metadata.get("json_file"), dataset))


def _in_json(path: Optional[str], dataset: str) -> Tuple[str, ...]:
    return read_summary(path, f"Data set {dataset}")[1] if path and os.path.isfile(path) else ()
