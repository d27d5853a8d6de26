"""Detectron2's ResNets with the first block of each stage alone, for detectors that are toys."""

from typing import Callable

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import (
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)

from ..modeling import build_fcos_resnet_fpn_backbone


def shallow(build: Callable[[CfgNode, ShapeSpec], FPN]) -> Callable[[CfgNode, ShapeSpec], FPN]:
    """
    A backbone whose steps take less than half the time. No MODEL.RESNETS.DEPTH gives it: below 50
    its channels are fixed, from there it has 16 blocks.
    """

    def build_shallow(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
        backbone = build(cfg, input_shape)
        resnet = backbone.bottom_up
        resnet.stages = [blocks[:1] for blocks in resnet.stages]
        for name, blocks in zip(resnet.stage_names, resnet.stages):
            resnet.add_module(name, blocks)
        return backbone

    return build_shallow


for _build in (
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
    build_fcos_resnet_fpn_backbone,
):
    _name = _build.__name__.replace("build_", "build_shallow_")
    BACKBONE_REGISTRY._do_register(_name, shallow(_build))
