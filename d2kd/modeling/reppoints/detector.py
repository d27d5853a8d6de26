"""RepPoints as a meta-architecture of Detectron2."""

from typing import Any, Dict, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage

from .cells import Cells, cells_of
from .check_keys import check_keys
from .head import RepPointsHead
from .inference import detect
from .losses import box_loss, class_loss
from .matching import match_boxes, match_points
from .points import PointBoxTransform


@META_ARCH_REGISTRY.register()
class RepPoints(nn.Module):
    """
    RepPoints of the first version, with boxes by moments. It has a member of each name that
    Detectron2's dense detectors have, so that the same tools read it: the "anchor" of a cell is a
    square of one stride around the cell's corner, and "deltas" are boxes in strides from there.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: RepPointsHead,
        head_in_features: Sequence[str],
        num_classes: int,
        box_matcher: Matcher,
        point_scale: float = 4.0,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        smooth_l1_beta: float = 0.11,
        init_loss_weight: float = 0.5,
        refine_loss_weight: float = 1.0,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.5,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        vis_period: int = 0,
        input_format: str = "BGR",
    ):
        """
        Args:
            head_in_features: names of the levels, finest first; each stride is twice the one before
            box_matcher: of ground truth and the boxes of the initial points, by IoU
            point_scale: the size of box, in strides, at which a level begins, and the unit of the
                box losses
            smooth_l1_beta: in that unit
            pixel_mean, pixel_std: of each channel of `input_format`
            vis_period: iterations between images of detections in TensorBoard; 0: none
        """
        super().__init__()
        self.backbone, self.head = backbone, head
        self.head_in_features = list(head_in_features)
        self.num_classes = num_classes
        strides = [backbone.output_shape()[k].stride for k in self.head_in_features]
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[x] for x in strides], aspect_ratios=[[1.0]], strides=strides, offset=0.0
        )
        self.box2box_transform = PointBoxTransform()
        self.box_matcher = box_matcher
        self.point_scale = point_scale
        self.focal_loss_alpha, self.focal_loss_gamma = focal_loss_alpha, focal_loss_gamma
        self.smooth_l1_beta = smooth_l1_beta
        self.init_loss_weight, self.refine_loss_weight = init_loss_weight, refine_loss_weight
        self.test_score_thresh, self.test_nms_thresh = test_score_thresh, test_nms_thresh
        self.test_topk_candidates = test_topk_candidates
        self.max_detections_per_image = max_detections_per_image
        self.vis_period, self.input_format = vis_period, input_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

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

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    visualize_training = RetinaNet.visualize_training

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
                return _postprocessed(found, batched_inputs, images.image_sizes)
            cells = cells_of(anchors, images.image_sizes, self.backbone.size_divisibility)
            gt = [x["instances"].to(self.device) for x in batched_inputs]
            losses = self.losses(logits, boxes, init_boxes, cells, gt)
            if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
                found = self.inference(logits, boxes, images.image_sizes)
                self.visualize_training(batched_inputs, found)
            return losses

    def preprocess_image(self, batched_inputs: List[Dict[str, Any]]) -> ImageList:
        """Normalise, pad and batch the images."""
        images = [x["image"].to(self.device) for x in batched_inputs]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

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
        init_on_objects, init_gt_boxes = self.label_points(cells, gt_instances)
        unit, beta = self.point_scale * cells.strides, self.smooth_l1_beta
        init = box_loss(init_boxes, init_gt_boxes, init_on_objects, unit, beta)
        refine = box_loss(boxes, gt_boxes, on_objects, unit, beta)
        return {
            "loss_cls": class_loss(logits, labels, self.focal_loss_alpha, self.focal_loss_gamma),
            "loss_box_init": init * self.init_loss_weight,
            "loss_box_refine": refine * self.refine_loss_weight,
        }

    @torch.no_grad()
    def label_anchors(
        self, init_boxes: Tensor, cells: Cells, gt_instances: List[Instances]
    ) -> Tuple[List[Tensor], Tensor]:
        """
        Targets of the classes and of the refined points.

        Args:
            init_boxes: (N, R, 4)

        Returns:
            labels of each image, (R,): 0 to K-1, K for background, -1 to ignore; and the matched
            ground-truth boxes (N, R, 4), of which those of objects count
        """
        labels, boxes = [], []
        for found, valid, gt in zip(init_boxes, cells.valid, gt_instances):
            index, label = match_boxes(gt.gt_boxes.tensor, found, valid, self.box_matcher)
            classes = torch.full_like(index, self.num_classes)
            classes[label == 1] = gt.gt_classes[index[label == 1]]
            labels.append(classes.masked_fill(label == -1, -1))
            boxes.append(_chosen(gt, index))
        return labels, torch.stack(boxes)

    @torch.no_grad()
    def label_points(self, cells: Cells, gt_instances: List[Instances]) -> Tuple[Tensor, Tensor]:
        """
        Targets of the initial points.

        Returns:
            on objects, boolean (N, R), and the matched ground-truth boxes (N, R, 4)
        """
        corners, strides, scale = cells.corners, cells.strides, self.point_scale
        index = [
            match_points(x.gt_boxes.tensor, corners, strides, valid, scale)
            for x, valid in zip(gt_instances, cells.valid)
        ]
        boxes = [_chosen(x, i) for x, i in zip(gt_instances, index)]
        return torch.stack(index) >= 0, torch.stack(boxes)

    def inference(
        self, logits: List[Tensor], boxes: List[Tensor], image_sizes: List[Tuple[int, int]]
    ) -> List[Instances]:
        """
        Args:
            logits, boxes: as in `losses`
            image_sizes: (height, width) of each image

        Returns:
            detections of each image, in pixels of the input
        """
        return [
            detect(
                [x[i].sigmoid() for x in logits],
                [x[i] for x in boxes],
                size,
                self.test_score_thresh,
                self.test_topk_candidates,
                self.test_nms_thresh,
                self.max_detections_per_image,
            )
            for i, size in enumerate(image_sizes)
        ]

    def _decode(self, deltas: List[Tensor], anchors: List[Boxes]) -> List[Tensor]:
        """Per level (N, Hi*Wi, 4): strides from the cell to XYXY in input pixels."""
        transform = self.box2box_transform
        return [transform.apply_deltas(x, level.tensor) for x, level in zip(deltas, anchors)]


def _chosen(gt: Instances, index: Tensor) -> Tensor:
    """(R,) -> the boxes of these numbers, (R, 4); any box where there is none."""
    if len(gt):
        return gt.gt_boxes.tensor[index.clamp(min=0)]
    return gt.gt_boxes.tensor.new_zeros(len(index), 4)


def _postprocessed(
    found: List[Instances], batched_inputs: List[Dict[str, Any]], image_sizes: Sequence[Any]
) -> List[Dict[str, Instances]]:
    """Detections in pixels of the images before they were resized."""
    sizes = [
        (x.get("height", height), x.get("width", width))
        for x, (height, width) in zip(batched_inputs, image_sizes)
    ]
    return [{"instances": detector_postprocess(x, *size)} for x, size in zip(found, sizes)]
