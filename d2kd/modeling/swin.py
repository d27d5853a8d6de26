"""Swin with an FPN from YAML. Detectron2 got the backbone after 0.6, but no builder for it."""

import importlib.util

from torch import nn

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7

from ..utils.checks import MAX_CHANNELS, check_range
from ..utils.compat import require
from .pyramid import build_pyramid


def build_swin(cfg: CfgNode) -> nn.Module:
    """
    Build detectron2.modeling.SwinTransformer from MODEL.SWIN: "p0".."p3" at strides 4 to 32.

    Raises:
        ValueError: the installed Detectron2 has no Swin
    """
    wanted_by = "MODEL.BACKBONE.NAME: a Swin backbone"
    swin = require("detectron2.modeling.backbone.swin", wanted_by, came="after 0.6")
    node = cfg.MODEL.SWIN
    if node.DROP_PATH_RATE > 0 and importlib.util.find_spec("timm") is None:
        raise ValueError(
            f"MODEL.SWIN.DROP_PATH_RATE is {node.DROP_PATH_RATE}: Detectron2 takes stochastic "
            "depth from timm, which is not installed. Run `pip install timm`, or set it to 0, "
            "which changes nothing for a teacher."
        )
    if len(node.DEPTHS) != len(node.NUM_HEADS):
        raise ValueError(
            f"MODEL.SWIN.DEPTHS {node.DEPTHS} and MODEL.SWIN.NUM_HEADS {node.NUM_HEADS} must be "
            "lists of one length, a stage each."
        )
    names = [f"p{i}" for i in range(len(node.DEPTHS))]
    if not node.OUT_FEATURES or any(x not in names for x in node.OUT_FEATURES):
        raise ValueError(
            f"MODEL.SWIN.OUT_FEATURES must name some of {', '.join(names)}, got "
            f"{list(node.OUT_FEATURES)}."
        )
    for key in ("EMBED_DIM", "WINDOW_SIZE"):
        check_range(f"MODEL.SWIN.{key}", node[key], 1, MAX_CHANNELS)
    check_range("MODEL.SWIN.DROP_PATH_RATE", node.DROP_PATH_RATE, 0, 1)
    return swin.SwinTransformer(
        embed_dim=node.EMBED_DIM,
        depths=node.DEPTHS,
        num_heads=node.NUM_HEADS,
        window_size=node.WINDOW_SIZE,
        drop_path_rate=node.DROP_PATH_RATE,
        out_indices=[int(name[1:]) for name in node.OUT_FEATURES],
        frozen_stages=node.FREEZE_AT,
    )


@BACKBONE_REGISTRY.register()
def build_swin_fpn_backbone(cfg: CfgNode, input_shape) -> FPN:
    """Swin with P2..P5 and a pooled P6, for two-stage detectors."""
    return build_pyramid(cfg, build_swin(cfg), cfg.MODEL.SWIN.OUT_FEATURES, LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_swin_fpn_backbone(cfg: CfgNode, input_shape) -> FPN:
    """Swin with P6 and P7 convolved from the last stage, for RetinaNet and FCOS."""
    bottom_up = build_swin(cfg)
    last = cfg.MODEL.SWIN.OUT_FEATURES[-1]
    top = LastLevelP6P7(
        bottom_up.output_shape()[last].channels, cfg.MODEL.FPN.OUT_CHANNELS, in_feature=last
    )
    return build_pyramid(cfg, bottom_up, cfg.MODEL.SWIN.OUT_FEATURES, top)
