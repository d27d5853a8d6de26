"""Detectors that upstream builds only from LazyConfig, made buildable from YAML."""

from .config import add_model_config
from .fcos import build_fcos
from .swin import build_retinanet_swin_fpn_backbone, build_swin_fpn_backbone

__all__ = [k for k in globals().keys() if not k.startswith("_")]
