from .adapter import build_adapter, build_adapters
from .attention import AttentionGuide, channel_attention, mean_one_softmax, spatial_attention
from .box_maps import covered, gaussian, paint
from .inside import mean_inside, zero_outside
from .masks import MaskRule, hide_top
from .normalize import standardise, unit_vectors
from .reconstruction import DualGenerator, Generator, squared_error
from .soft_labels import (
    class_divergence,
    difference_weighted,
    giou_distance,
    largest_probability,
    log_iou_distance,
)

__all__ = [k for k in globals().keys() if not k.startswith("_")]
