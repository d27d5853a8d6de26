"""What a detector is recognised by: its config as text, and the sha256 of its weights."""

import hashlib
from typing import Dict

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..weights.trained_config import OF_YAML


def make_manifest(config: str, weights: str) -> Dict[str, str]:
    """
    Args:
        config: of :func:`identity`, or a LazyConfig's model as text
        weights: path or URL; "": random ones
    """
    return {"config": config, "weights_sha256": _sha256(weights)}


def identity(cfg: CfgNode) -> str:
    """What makes the teacher the detector it is; not where it runs or how it was trained."""
    model = cfg.MODEL.clone()
    model.defrost()
    model.DEVICE, model.WEIGHTS = "", ""
    return f"{OF_YAML}{cfg.INPUT.FORMAT}\n{model.dump()}"


def _sha256(weights: str) -> str:
    if not weights:
        return ""
    digest = hashlib.sha256()
    with PathManager.open(weights, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
