from typing import Sequence

from torch import nn

from detectron2.config import CfgNode
from detectron2.modeling.backbone.fpn import FPN


def build_pyramid(
    cfg: CfgNode, bottom_up: nn.Module, in_features: Sequence[str], top_block: nn.Module
) -> FPN:
    """Detectron2's FPN by the keys of MODEL.FPN."""
    return FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
