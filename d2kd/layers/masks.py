"""Masks that hide cells or channels of a map from a generator."""

import math
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from ..utils.checks import check_choice
from .inside import zero_outside

RULES = ("ratio", "threshold")
HIDE = ("sampled", "most", "least", "random")


@dataclass(frozen=True)
class MaskRule:
    """
    Turns an attention map into a mask.

    Attributes:
        ratio: in [0, 1): the share to hide; published for MGD: 0.65 dense, 0.45 two-stage
        rule: "ratio": hide a fixed share, so that methods differ only in where they hide;
            "threshold": hide where attention is THRESHOLD or more, a share that depends on the
            image
        threshold: attention has mean 1, so 1.0 hides entries of the average or above
        hide: "sampled": drawn in each step, in proportion to attention. The abstracts ask to
            rebuild important regions, but the "most" attended ones are always the same, and hidden
            entries get no gradient, so the student would never learn them (docs/earlier_results.md:
            8 AP less for DMKD). "least" attended and "random" are for ablations
    """

    ratio: float = 0.65
    rule: str = "ratio"
    threshold: float = 1.0
    hide: str = "sampled"

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, RULES)
        check_choice("hide", self.hide, HIDE)
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), got {self.ratio}: it is the share to hide.")
        if not 0 < self.threshold < math.inf:
            raise ValueError(
                f"threshold must be above 0, got {self.threshold}: attention has mean 1."
            )
        if self.rule == "threshold" and self.hide in ("random", "sampled"):
            raise ValueError(
                f"rule is 'threshold', which needs HIDE 'most' or 'least', got {self.hide!r}."
            )

    def __call__(self, attention: Tensor, inside: Optional[Tensor] = None) -> Tensor:
        """
        Args:
            attention: (N, 1, H, W) over cells or (N, C, 1, 1) over channels, mean 1
            inside: cells inside the image; None: all

        Returns:
            boolean, shaped as `attention`: True is visible; cells outside are hidden
        """
        if self.rule == "threshold":
            most = attention >= self.threshold
            visible = ~most if self.hide == "most" else most
            return zero_outside(visible, inside)
        scores = {
            "most": lambda: attention,
            "least": lambda: -attention,
            "random": lambda: torch.rand_like(attention),
            # The top k are a sample without replacement, weighted by attention.
            "sampled": lambda: attention / torch.empty_like(attention).exponential_(),
        }
        return hide_top(scores[self.hide](), self.ratio, inside)


def hide_top(scores: Tensor, ratio: float, inside: Optional[Tensor] = None) -> Tensor:
    """
    Hide exactly ceil(ratio * n) of the n entries inside each image.

    Args:
        scores: (N, ...), the largest are hidden
        ratio: in [0, 1)
        inside: boolean, shaped as `scores`; None: all

    Returns:
        boolean, shaped as `scores`: True is visible
    """
    flat = scores.flatten(1)
    largest = math.ceil(ratio * flat.shape[1] - _TINY)
    # Not quantile, which neither gives exact counts nor supports large maps.
    if inside is None:
        order = flat.topk(largest, dim=1).indices
        return torch.ones_like(flat, dtype=torch.bool).scatter_(1, order, False).view_as(scores)
    visible = inside.flatten(1)
    # In float64, as in Python: in float32 0.6 * 50000 is above 30000.
    counts = (ratio * visible.sum(dim=1, keepdim=True).double() - _TINY).ceil()
    order = flat.masked_fill(~visible, -math.inf).topk(largest, dim=1).indices
    shown = torch.arange(largest, device=flat.device) >= counts
    return visible.scatter(1, order, shown & visible.gather(1, order)).view_as(scores)


_TINY = 1e-6  # 0.07 * 100 is 7.000000000000001, and should hide 7
