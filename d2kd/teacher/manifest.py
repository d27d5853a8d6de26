"""What a detector is recognised by: its config as text, and the sha256 of its weights."""

from typing import Dict

from detectron2.config import CfgNode

from ..utils.sha256 import sha256_of
from ..weights.trained_config import OF_YAML


def make_manifest(config: str, weights: str) -> Dict[str, str]:
    """
    Args:
        config: of :func:`identity`, or a LazyConfig's model as text
        weights: path or URL; "": random ones
    """
    return {"config": config, "weights_sha256": sha256_of(weights) if weights else ""}


def identity(cfg: CfgNode) -> str:
    """What makes the teacher the detector it is; not where it runs or how it was trained."""
    model = cfg.MODEL.clone()
    model.defrost()
    model.DEVICE, model.WEIGHTS = "", ""
    return f"{OF_YAML}{cfg.INPUT.FORMAT}\n{model.dump()}"
