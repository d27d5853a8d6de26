from .adapter import build_adapter, build_adapters
from .attention import channel_attention, mean_inside, mean_one_softmax, spatial_attention
from .box_maps import covered, paint
from .dual_generator import DualGenerator
from .dual_mask import add_dual_mask_config, read_dual_mask
from .gather import gather_rows
from .generator import Generator
from .global_context import GlobalContext
from .guide import AttentionGuide, add_attention_config
from .high_pass import high_pass
from .masks import MaskRule, add_mask_config, hide_top
from .object_mask import ObjectMask, add_object_mask_config
from .per_anchor import PerAnchorLinear
from .reconstruction import (
    add_reference_config,
    pixel_factor,
    read_reference_pixels,
    squared_error,
)
from .relation import average_cells, relation_error
from .review import ReviewFusion, pyramid_error
from .scales import cut_windows, max_pool, pool_inside
from .soft_labels import (
    class_divergence,
    difference_weighted,
    giou_distance,
    largest_probability,
    log_iou_distance,
)
from .standardise import standardise
from .unit import unit_vectors

__all__ = [k for k in globals().keys() if not k.startswith("_")]
