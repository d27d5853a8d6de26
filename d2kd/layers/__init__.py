from .adapter import build_adapter, build_adapters
from .attention import AttentionGuide, channel_attention, mean_one_softmax, spatial_attention
from .box_maps import Axes, paint_maps, touched_cells
from .inside import mean_inside, zero_outside
from .log_sum_exp import log_sum_exp_of_products
from .masks import MaskRule, hide_top
from .normalize import standardise, std_and_mean, unit_vectors
from .reconstruction import DualGenerator, Generator, squared_error
from .side_by_side import each_level, inside_side_by_side, match_side_by_side, side_by_side
from .soft_labels import (
    class_divergence,
    difference_weighted,
    giou_distance,
    largest_probability,
    log_iou_distance,
)

__all__ = [k for k in globals().keys() if not k.startswith("_")]
