"""What RepPoints does as Detectron2's dense detectors do: images in, detections out."""

from typing import Any, Dict, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from detectron2.modeling import RetinaNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances

from .inference import detect


class DenseDetector(nn.Module):
    """
    A backbone, and a head that predicts once per cell of its levels. The "anchor" of a cell is a
    square of one stride around the cell's corner.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: Sequence[str],
        num_classes: int,
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
        self.test_score_thresh, self.test_nms_thresh = test_score_thresh, test_nms_thresh
        self.test_topk_candidates = test_topk_candidates
        self.max_detections_per_image = max_detections_per_image
        self.vis_period, self.input_format = vis_period, input_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    visualize_training = RetinaNet.visualize_training

    def preprocess_image(self, batched_inputs: List[Dict[str, Any]]) -> ImageList:
        """Normalise, pad and batch the images."""
        images = [x["image"].to(self.device) for x in batched_inputs]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def inference(
        self, logits: List[Tensor], boxes: List[Tensor], image_sizes: List[Tuple[int, int]]
    ) -> List[Instances]:
        """
        Args:
            logits: per level (N, Hi*Wi, K)
            boxes: per level (N, Hi*Wi, 4), XYXY in input pixels
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


def postprocessed(
    found: List[Instances], batched_inputs: List[Dict[str, Any]], image_sizes: Sequence[Any]
) -> List[Dict[str, Instances]]:
    """Detections in pixels of the images before they were resized."""
    sizes = [
        (x.get("height", height), x.get("width", width))
        for x, (height, width) in zip(batched_inputs, image_sizes)
    ]
    return [{"instances": detector_postprocess(x, *size)} for x, size in zip(found, sizes)]
