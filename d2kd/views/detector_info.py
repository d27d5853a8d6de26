"""What is known of a detector before any batch."""

from dataclasses import dataclass, field
from typing import Dict, FrozenSet, Mapping, Tuple

from detectron2.layers import ShapeSpec


@dataclass(frozen=True)
class DetectorInfo:
    """
    What a head may know of a detector when it is built.

    `name`: meta-architecture; `shapes`: level name to channels and stride; `num_classes`:
    foreground classes; `provides`: as of its :class:`DetectorView`; `num_anchors`: dense
    predictions per cell; `two_stage`: whether classes come from a head on regions;
    `class_activation`: how that head's logits become probabilities, "softmax" over classes and
    background, or a "sigmoid" for each class (MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE);
    `dense_levels`: levels with dense predictions; `anchors`: of each of them, those of its first
    cell, XYXY in input pixels, in the order of the predictions; `vector_channels`: length of a
    region's vector (`region_vectors`), 0 without; `roi_size`: cells along a side of its RoI
    features; `mask_size`: of those that its mask head reads, 0 without one; `box_weights`: factors
    of its box deltas (BBOX_REG_WEIGHTS of MODEL.ROI_BOX_HEAD, or of MODEL.RETINANET), () without
    anchors; `anchor_free`: whether cells predict from a point of theirs, as those of FCOS and
    RepPoints: what `anchors` has then is a square around that point.
    """

    name: str
    shapes: Dict[str, ShapeSpec]
    num_classes: int
    provides: FrozenSet[str]
    num_anchors: int = 0
    two_stage: bool = False
    class_activation: str = "softmax"
    dense_levels: Tuple[str, ...] = ()
    anchors: Mapping[str, Tuple[Tuple[float, ...], ...]] = field(default_factory=dict)
    vector_channels: int = 0
    roi_size: int = 0
    mask_size: int = 0
    box_weights: Tuple[float, ...] = ()
    anchor_free: bool = False

    @property
    def channels(self) -> int:
        """
        Of every level of the pyramid.

        Raises:
            ValueError: levels differ, so that RoI features of several have no common size
        """
        channels = {v.channels for v in self.shapes.values()}
        if len(channels) > 1:
            listed = ", ".join(f"{k} ({v.channels})" for k, v in self.shapes.items())
            raise ValueError(
                f"DISTILL.HEADS: RoI features of several levels need equal channels on all; "
                f"{self.name} has {listed}. Use a backbone with an FPN."
            )
        return channels.pop()
