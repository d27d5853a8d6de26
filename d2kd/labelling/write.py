"""The pseudo-labels in COCO's format, and the YAML that trains on them."""

import json
import os
from typing import Any, Dict, Mapping, Sequence

from detectron2.config import CfgNode

from .. import __version__
from .inference import Annotation
from .labelled_set import LabelledSet
from .matches import IOU
from .thresholds import Gate

DESCRIPTION = "Pseudo-labels: detections of a teacher that nobody has checked"


def describe_labels(
    gates: Sequence[Gate], labelled: LabelledSet, wanted: float, teacher: Mapping[str, str]
) -> Dict[str, Any]:
    """
    Args:
        wanted: precision
        teacher: what it is known by

    Returns:
        the JSON's "info"
    """
    keys = ("threshold", "precision", "recall")
    return {
        "description": DESCRIPTION,
        "d2kd_version": __version__,
        "teacher": dict(teacher),
        "labelled_set": labelled.name,
        "iou": IOU,
        "wanted_precision": wanted,
        "classes": {x.name: {k: getattr(x, k) for k in keys} for x in gates},
    }


def label_json(
    info: Mapping[str, Any],
    categories: Sequence[Mapping[str, Any]],
    images: Sequence[Mapping[str, Any]],
    labels: Sequence[Annotation],
    folder: str,
) -> Dict[str, Any]:
    """
    Args:
        info: of :func:`describe_labels`
        categories: COCO's
        images: in Detectron2's format
        folder: what file names are relative to

    Returns:
        the JSON's content
    """
    return {
        "info": dict(info),
        "categories": [
            {k: x[k] for k in ("id", "name", "supercategory") if k in x} for x in categories
        ],
        "images": [
            {
                "id": x["image_id"],
                "file_name": os.path.relpath(x["file_name"], folder),
                "width": x["width"],
                "height": x["height"],
            }
            for x in images
        ],
        "annotations": [{"id": i, **x} for i, x in enumerate(labels, 1)],
    }


def training_yaml(cfg: CfgNode, json_file: str, folder: str) -> str:
    """DATASETS of a training on the config's own sets and the pseudo-labels, as YAML."""
    name = f"pseudo_{os.path.splitext(os.path.basename(json_file))[0]}"
    lines = ["DATASETS:", "  COCO_FORMAT:"]
    for entry in (*cfg.DATASETS.COCO_FORMAT, {"NAME": name, "JSON": json_file, "IMAGES": folder}):
        values = ", ".join(f"{k}: {json.dumps(v)}" for k, v in entry.items())
        lines.append(f"    - {{{values}}}")
    lines.append(f"  TRAIN: {json.dumps([*cfg.DATASETS.TRAIN, name])}")
    return "\n".join(lines)
