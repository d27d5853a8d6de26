"""RepPoints as a meta-architecture of Detectron2."""

from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage

from .cells import Cells, cells_of
from .check_keys import check_keys
from .dense_detector import DenseDetector, postprocessed
from .head import RepPointsHead
from .losses import box_loss, class_loss
from .points import PointBoxTransform
from .targets import init_targets, refine_targets


@META_ARCH_REGISTRY.register()
class RepPoints(DenseDetector):
    """
    RepPoints of the first version, with boxes by moments. It has a member of each name that
    Detectron2's dense detectors have, so that the same tools read it: "deltas" are boxes in strides
    from the corner of their cell.
    """

    @configurable
    def __init__(
        self,
        *,
        box_matcher: Matcher,
        point_scale: float = 4.0,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        smooth_l1_beta: float = 0.11,
        init_loss_weight: float = 0.5,
        refine_loss_weight: float = 1.0,
        **parts: Any,
    ):
        """
        Args:
            box_matcher: of ground truth and the boxes of the initial points, by IoU
            point_scale: the size of box, in strides, at which a level begins, and the unit of the
                box losses
            smooth_l1_beta: in that unit
            parts: of a DenseDetector
        """
        super().__init__(**parts)
        self.box2box_transform = PointBoxTransform()
        self.box_matcher = box_matcher
        self.point_scale = point_scale
        self.focal_loss_alpha, self.focal_loss_gamma = focal_loss_alpha, focal_loss_gamma
        self.smooth_l1_beta = smooth_l1_beta
        self.init_loss_weight, self.refine_loss_weight = init_loss_weight, refine_loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict[str, Any]:
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

    def forward(self, batched_inputs: List[Dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: Detectron2's standard input

        Returns:
            in training the losses by name, else Detectron2's standard output
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        maps = self.head([features[k] for k in self.head_in_features])
        anchors = self.anchor_generator(maps[0])
        # Whatever follows is in float32, also under AMP.
        with torch.autocast(self.device.type, enabled=False):
            logits, deltas, init_deltas = (
                [x.float().flatten(2).transpose(1, 2) for x in levels] for levels in maps
            )
            boxes, init_boxes = (self._decode(x, anchors) for x in (deltas, init_deltas))
            if not self.training:
                found = self.inference(logits, boxes, images.image_sizes)
                return postprocessed(found, batched_inputs, images.image_sizes)
            cells = cells_of(anchors, images.image_sizes, self.backbone.size_divisibility)
            gt = [x["instances"].to(self.device) for x in batched_inputs]
            losses = self.losses(logits, boxes, init_boxes, cells, gt)
            if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
                found = self.inference(logits, boxes, images.image_sizes)
                self.visualize_training(batched_inputs, found)
            return losses

    def losses(
        self,
        logits: List[Tensor],
        boxes: List[Tensor],
        init_boxes: List[Tensor],
        cells: Cells,
        gt_instances: List[Instances],
    ) -> Dict[str, Tensor]:
        """
        Args:
            logits: per level (N, Hi*Wi, K)
            boxes, init_boxes: of the refined and of the initial points, per level (N, Hi*Wi, 4),
                XYXY in input pixels
            cells: of all levels
            gt_instances: of each image
        """
        logits, boxes, init_boxes = (torch.cat(x, dim=1) for x in (logits, boxes, init_boxes))
        label_lists, gt_boxes = self.label_anchors(init_boxes, cells, gt_instances)
        labels = torch.stack(label_lists)
        on_objects = (labels >= 0) & (labels < self.num_classes)
        init_on_objects, init_gt_boxes = init_targets(cells, gt_instances, self.point_scale)
        unit, beta = self.point_scale * cells.strides, self.smooth_l1_beta
        init = box_loss(init_boxes, init_gt_boxes, init_on_objects, unit, beta)
        refine = box_loss(boxes, gt_boxes, on_objects, unit, beta)
        return {
            "loss_cls": class_loss(logits, labels, self.focal_loss_alpha, self.focal_loss_gamma),
            "loss_box_init": init * self.init_loss_weight,
            "loss_box_refine": refine * self.refine_loss_weight,
        }

    def label_anchors(
        self, init_boxes: Tensor, cells: Cells, gt_instances: List[Instances]
    ) -> Tuple[List[Tensor], Tensor]:
        """As :func:`refine_targets`; views listen to it, by the name that it has everywhere."""
        return refine_targets(init_boxes, cells, gt_instances, self.box_matcher, self.num_classes)

    def _decode(self, deltas: List[Tensor], anchors: List[Boxes]) -> List[Tensor]:
        """Per level (N, Hi*Wi, 4): strides from the cell to XYXY in input pixels."""
        transform = self.box2box_transform
        return [transform.apply_deltas(x, level.tensor) for x, level in zip(deltas, anchors)]
