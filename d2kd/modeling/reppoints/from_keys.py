"""From MODEL.REPPOINTS and Detectron2's own keys to the arguments of RepPoints."""

from typing import Any, Dict

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from detectron2.modeling.matcher import Matcher

from .check_keys import check_keys
from .head import RepPointsHead


def arguments(cfg: CfgNode) -> Dict[str, Any]:
    """
    Raises:
        ValueError: a value of MODEL.REPPOINTS outside its range
    """
    node, backbone = cfg.MODEL.REPPOINTS, build_backbone(cfg)
    shapes = backbone.output_shape()
    check_keys(node, shapes)
    return {
        "backbone": backbone,
        "head": RepPointsHead(
            shapes[node.IN_FEATURES[0]].channels,
            node.NUM_CLASSES,
            node.NUM_CONVS,
            node.NORM,
            node.PRIOR_PROB,
        ),
        "head_in_features": node.IN_FEATURES,
        "num_classes": node.NUM_CLASSES,
        "box_matcher": Matcher(
            node.IOU_THRESHOLDS, node.IOU_LABELS, allow_low_quality_matches=True
        ),
        "point_scale": node.POINT_SCALE,
        "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
        "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
        "smooth_l1_beta": node.SMOOTH_L1_LOSS_BETA,
        "init_loss_weight": node.INIT_LOSS_WEIGHT,
        "refine_loss_weight": node.REFINE_LOSS_WEIGHT,
        "test_score_thresh": node.SCORE_THRESH_TEST,
        "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
        "test_nms_thresh": node.NMS_THRESH_TEST,
        "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
        "vis_period": cfg.VIS_PERIOD,
        "input_format": cfg.INPUT.FORMAT,
    }
