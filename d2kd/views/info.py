"""What is known of a detector before any batch."""

from dataclasses import dataclass
from typing import Dict, FrozenSet, Tuple

from detectron2.layers import ShapeSpec


@dataclass(frozen=True)
class DetectorInfo:
    """
    What a head may know of a detector when it is built.

    `name`: meta-architecture; `shapes`: level name to channels and stride; `num_classes`:
    foreground classes; `members`: what the detector's view can give; `num_anchors`: dense
    predictions per cell; `two_stage`: whether classes are told by a head on regions;
    `dense_levels`: levels with dense predictions; `vector_channels`: length of a region's vector
    (`region_vectors`), 0 without; `roi_size`: cells along a side of its RoI features;
    `box_weights`: how a two-stage detector scales box deltas (MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS).
    """

    name: str
    shapes: Dict[str, ShapeSpec]
    num_classes: int
    members: FrozenSet[str]
    num_anchors: int = 0
    two_stage: bool = False
    dense_levels: Tuple[str, ...] = ()
    vector_channels: int = 0
    roi_size: int = 0
    box_weights: Tuple[float, ...] = ()

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
