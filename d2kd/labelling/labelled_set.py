"""The labelled set, on which the thresholds are chosen."""

from typing import Any, Dict, List, NamedTuple, Tuple

from pycocotools.coco import COCO

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..config import student_config
from ..data import register_datasets
from ..engine.evaluator import complete_truth
from ..utils.silent import silent


class LabelledSet(NamedTuple):
    """
    `images`: in Detectron2's format; `truth`: as pycocotools needs it; `categories`: COCO's,
    ordered by id, which is Detectron2's class order.
    """

    name: str
    images: List[Dict[str, Any]]
    truth: COCO
    categories: List[Dict[str, Any]]

    @property
    def names(self) -> Tuple[str, ...]:
        return tuple(x["name"] for x in self.categories)


def read_labelled_set(cfg: CfgNode) -> LabelledSet:
    """
    Register, check and read the first set of DATASETS.TEST.

    Raises:
        ValueError, OSError: there is none, it is not in COCO's format, or its classes are not those
            of the config's detector
    """
    if not cfg.DATASETS.TEST:
        raise ValueError(
            "DATASETS.TEST is empty: its first set is the labelled one, on which the thresholds "
            "are chosen."
        )
    name = cfg.DATASETS.TEST[0]
    alone = student_config(cfg)
    alone.DATASETS.TEST = (name,)
    register_datasets(alone, alone.MODEL.META_ARCHITECTURE, parts=("TEST",))
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "coco" or not metadata.get("json_file"):
        raise ValueError(
            f"DATASETS.TEST: {name!r} is not in COCO's format, so that no threshold can be chosen "
            "on it."
        )
    with silent():
        truth = COCO(PathManager.get_local_path(metadata.json_file))
    complete_truth(truth)
    categories = truth.loadCats(sorted(truth.getCatIds()))
    return LabelledSet(name, DatasetCatalog.get(name), truth, categories)
