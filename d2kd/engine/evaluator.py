import os
from typing import Optional

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None
) -> DatasetEvaluator:
    """
    Detectron2's evaluator for the data set's type.

    Args:
        output_folder: None: "inference" in OUTPUT_DIR

    Raises:
        ValueError: a type without boxes to evaluate
    """
    output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    if kind == "coco":
        # One implementation everywhere: the fast one needs Detectron2's compiled part.
        return COCOEvaluator(dataset_name, output_dir=output_folder, use_fast_impl=False)
    if kind == "lvis":
        return LVISEvaluator(dataset_name, output_dir=output_folder)
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    raise ValueError(
        f"DATASETS.TEST: {dataset_name!r} has the evaluator type {kind!r}; d2kd evaluates "
        "'coco', 'lvis' and 'pascal_voc' sets."
    )
