"""Detectors that upstream builds only from LazyConfig, or does not have, from YAML."""

from .deform_conv import use_in_resnets
from .fcos import build_fcos, build_fcos_resnet_fpn_backbone
from .model_keys import add_model_config
from .reppoints import RepPoints
from .swin import build_retinanet_swin_fpn_backbone, build_swin_fpn_backbone
from .timm_fpn import build_retinanet_timm_fpn_backbone, build_timm_fpn_backbone

__all__ = [k for k in globals().keys() if not k.startswith("_")]

use_in_resnets()
