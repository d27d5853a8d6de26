"""FCOS from YAML. Detectron2 has the class since 0.6, but registers no builder for it."""

from functools import lru_cache
from typing import Any, Dict, List, Sequence, Type

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7
from detectron2.modeling.backbone.resnet import build_resnet_backbone

from ..utils.checks import check_range, check_weight
from ..utils.compat import require
from .pyramid import build_pyramid


def build_fcos(cfg: CfgNode) -> nn.Module:
    """
    Build detectron2.modeling.FCOS from MODEL.FCOS and MODEL.BACKBONE. Its losses are computed in
    float32 also under AMP.

    Raises:
        ValueError: the installed Detectron2 has no FCOS
    """
    fcos = require("detectron2.modeling.meta_arch.fcos", "MODEL.META_ARCHITECTURE: FCOS")
    node = cfg.MODEL.FCOS
    _check(node)
    backbone = build_backbone(cfg)
    shapes = backbone.output_shape()
    in_features = list(node.IN_FEATURES)
    if not in_features or any(x not in list(shapes) for x in in_features):
        raise ValueError(
            f"MODEL.FCOS.IN_FEATURES must name levels of the backbone, {', '.join(shapes)}, got "
            f"{in_features}."
        )
    channels = shapes[in_features[0]].channels
    return _with_float_losses(fcos.FCOS)(
        backbone=backbone,
        head=fcos.FCOSHead(
            input_shape=[shapes[f] for f in in_features],
            num_classes=node.NUM_CLASSES,
            conv_dims=[channels] * node.NUM_CONVS,
            prior_prob=node.PRIOR_PROB,
            norm=node.NORM,
        ),
        head_in_features=in_features,
        num_classes=node.NUM_CLASSES,
        center_sampling_radius=node.CENTER_SAMPLING_RADIUS,
        focal_loss_alpha=node.FOCAL_LOSS_ALPHA,
        focal_loss_gamma=node.FOCAL_LOSS_GAMMA,
        test_score_thresh=node.SCORE_THRESH_TEST,
        test_topk_candidates=node.TOPK_CANDIDATES_TEST,
        test_nms_thresh=node.NMS_THRESH_TEST,
        max_detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )


@lru_cache(maxsize=None)
def _with_float_losses(base: Type[nn.Module]) -> Type[nn.Module]:
    """
    Args:
        base: Detectron2's FCOS. It decodes boxes in the type of the deltas, and its IoU then writes
            float32 into float16, an error in the first step. Its own RetinaNet decodes in float32.
    """

    class FCOS(base):
        def losses(
            self,
            anchors: List[Any],
            pred_logits: Sequence[Tensor],
            gt_labels: List[Tensor],
            pred_anchor_deltas: Sequence[Tensor],
            gt_boxes: List[Tensor],
            pred_centerness: Sequence[Tensor],
        ) -> Dict[str, Tensor]:
            logits, deltas, centerness = (
                [x.float() for x in levels]
                for levels in (pred_logits, pred_anchor_deltas, pred_centerness)
            )
            with torch.autocast(logits[0].device.type, enabled=False):
                return super().losses(anchors, logits, gt_labels, deltas, gt_boxes, centerness)

    return FCOS


def _check(node: CfgNode) -> None:
    check_range("MODEL.FCOS.NUM_CLASSES", node.NUM_CLASSES, 1, 10**6)
    check_range("MODEL.FCOS.NUM_CONVS", node.NUM_CONVS, 1, 100)
    check_range("MODEL.FCOS.PRIOR_PROB", node.PRIOR_PROB, 1e-6, 1 - 1e-6)
    check_range("MODEL.FCOS.FOCAL_LOSS_ALPHA", node.FOCAL_LOSS_ALPHA, 0, 1)
    check_weight("MODEL.FCOS.FOCAL_LOSS_GAMMA", node.FOCAL_LOSS_GAMMA)
    radius, why = node.CENTER_SAMPLING_RADIUS, "within 0 of an object's centre no cell learns it"
    check_range("MODEL.FCOS.CENTER_SAMPLING_RADIUS", radius, 1e-3, 10**4, why)
    check_range("MODEL.FCOS.SCORE_THRESH_TEST", node.SCORE_THRESH_TEST, 0, 1)
    check_range("MODEL.FCOS.NMS_THRESH_TEST", node.NMS_THRESH_TEST, 0, 1)
    check_range("MODEL.FCOS.TOPK_CANDIDATES_TEST", node.TOPK_CANDIDATES_TEST, 1, 10**6)


if "FCOS" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY._do_register("FCOS", build_fcos)


@BACKBONE_REGISTRY.register()
def build_fcos_resnet_fpn_backbone(cfg: CfgNode, input_shape) -> FPN:
    """A ResNet with an FPN whose P6 and P7 come from P5, as FCOS has it (RetinaNet: from C5)."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return build_pyramid(
        cfg,
        build_resnet_backbone(cfg, input_shape),
        cfg.MODEL.FPN.IN_FEATURES,
        LastLevelP6P7(channels, channels, in_feature="p5"),
    )
