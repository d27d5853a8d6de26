"""The keys of a pair of masks, of cells and of channels, and of the attention behind them."""

from typing import Any, Dict

from detectron2.config import CfgNode

from .guide import AttentionGuide, add_attention_config
from .masks import MaskRule, add_mask_config


def add_dual_mask_config(node: CfgNode) -> None:
    """Write the keys into the node of a head."""
    node.CELL_MASK = CfgNode()
    add_mask_config(node.CELL_MASK, ratio=0.65)
    # Half of the channels leaves enough for the generator to mix the others from.
    node.CHANNEL_MASK = CfgNode()
    add_mask_config(node.CHANNEL_MASK, ratio=0.5)
    add_attention_config(node)


def read_dual_mask(key: str, node: CfgNode) -> Dict[str, Any]:
    """
    Args:
        key: of `node`, for the errors

    Returns:
        "cell_mask", "channel_mask" and "guide", as the constructors of heads take them

    Raises:
        ValueError: a value outside its range
    """
    return {
        "cell_mask": MaskRule.from_config(f"{key}.CELL_MASK", node.CELL_MASK),
        "channel_mask": MaskRule.from_config(f"{key}.CHANNEL_MASK", node.CHANNEL_MASK),
        "guide": AttentionGuide.from_config(key, node),
    }
