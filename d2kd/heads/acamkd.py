from typing import Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import build_adapters, mean_inside, zero_outside
from ..pairing.levels import LevelPair, match_inside
from ..utils.checks import check_range, check_weight
from ..views import DetectorView
from .registry import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class ACAMKDHead(nn.Module):
    """
    Adaptive and Cooperative Attention Masking, https://arxiv.org/abs/2503.06307 (RECONSTRUCTED from
    notes on the paper; no code was released): where and in which channels the student follows the
    teacher is decided by masks that are learnt from both, which a second term keeps apart.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i; M
    masks of each kind.

    Attributes:
        loss_weight: published
    """

    loss_weight = 1.0

    def __init__(
        self, *, levels: Sequence[LevelPair], num_masks: int = 6, diversity_weight: float = 1.0
    ):
        """
        Args:
            levels: the pairs of levels to distil
            num_masks: M, of cells and as many of channels; published: 6
            diversity_weight: of the term that keeps masks apart; published: 1
        """
        super().__init__()
        check_range("num_masks", num_masks, 1, 64, "each is as large as the map")
        check_weight("diversity_weight", diversity_weight)
        self.levels = levels
        self.diversity_weight = diversity_weight
        self.adapter = build_adapters(levels)
        self.masks = nn.ModuleDict(
            {p.student: CooperativeMasks(p.teacher_channels, num_masks) for p in levels}
        )

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        ::

            E = (T - adapter(S))^2,  masks a_m of cells and b_m of channels, of each image
            loss = mean over n, m of [mean over c of (sum over cells of E a_m) / (sum of a_m)
                                      + mean over cells of (sum over c of E b_m) / (sum of b_m)]
            diversity = mean over n and pairs of masks of [Dice(a_m, a_m') + Dice(b_m, b_m')]
            Dice(a, a') = 2 <a, a'> / (|a|^2 + |a'|^2)

        Args:
            student, teacher: views with features S (N, Cs, Hi, Wi) and T (N, Ct, Hi, Wi)

        Returns:
            {"loss_acamkd": {level: scalar}, "loss_acamkd_diversity": {level: scalar}}, over the
            cells inside the images, averaged over images; the second only if it has a weight and
            there are two masks or more
        """
        losses, diversity, self.maps = {}, {}, {"attended": {}}
        for level, x, target, inside in match_inside(self.levels, student, teacher):
            x = self.adapter[level](x)
            cells, channels = self.masks[level](x, target, inside)
            error = zero_outside((x.float() - target.float()).square(), inside)
            by_cells = _weighted_mean(error.mean(dim=1).flatten(1), cells)
            by_channels = _weighted_mean(mean_inside(error, inside).flatten(1), channels)
            losses[level] = by_cells + by_channels
            if self.diversity_weight and cells.shape[1] > 1:
                diversity[level] = self.diversity_weight * (_overlap(cells) + _overlap(channels))
            attended = cells.detach().mean(dim=1, keepdim=True)
            self.maps["attended"][level] = attended.unflatten(2, x.shape[-2:])
        terms = {"loss_acamkd": losses, "loss_acamkd_diversity": diversity}
        return {k: v for k, v in terms.items() if v}


class CooperativeMasks(nn.Module):
    """The teacher's cells ask the student's; masks of cells and of channels follow the answers."""

    def __init__(self, channels: int, num_masks: int):
        super().__init__()
        hidden = max(channels // 2, 1)
        self.query, self.key = nn.Conv2d(channels, hidden, 1), nn.Conv2d(channels, hidden, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.of_cells = nn.Parameter(torch.randn(num_masks, channels) / channels**0.5)
        self.of_channels = nn.Parameter(torch.randn(num_masks, 1))

    def forward(
        self, x: Tensor, target: Tensor, inside: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor]:
        """
        Args:
            x, target: adapted student's and teacher's features, (N, C, H, W)
            inside: (N, 1, H, W), cells inside the image, which alone are read; None: all

        Returns:
            masks of cells (N, M, H*W), 0 outside, and of channels (N, M, C), in (0, 1), float32
        """
        query, key, value = (
            f(y).flatten(2).transpose(1, 2)[:, None].contiguous()
            for f, y in ((self.query, target), (self.key, x), (self.value, x))
        )
        readable = None if inside is None else inside.flatten(2)[:, :, None]
        # Never with the map of all pairs of cells, of P3's size to the square. Kernels that do
        # without it want queries as wide as values, and divide by the root of that width.
        hidden, channels = query.shape[-1], value.shape[-1]
        query = query * (channels / hidden) ** 0.5
        query, key = (F.pad(y, (0, channels - hidden)) for y in (query, key))
        answers = F.scaled_dot_product_attention(query, key, value, attn_mask=readable)
        answers = answers[:, 0].transpose(1, 2).float()  # (N, C, H*W)
        with torch.autocast(x.device.type, enabled=False):
            cells = (self.of_cells @ answers).sigmoid()
        if inside is not None:
            cells = cells * inside.flatten(2)
        mean = mean_inside(answers.view_as(target), inside).flatten(2).transpose(1, 2)  # (N, 1, C)
        return cells, (self.of_channels * mean).sigmoid()


def _weighted_mean(values: Tensor, masks: Tensor) -> Tensor:
    """(N, K), (N, M, K) -> scalar: mean over the masks and images of the mean under each mask."""
    total = (values[:, None] * masks).sum(dim=2)
    return (total / masks.sum(dim=2).clamp(min=1e-6)).mean()


def _overlap(masks: Tensor) -> Tensor:
    """(N, M, K) -> scalar: Dice's coefficient, averaged over the pairs of masks and the images."""
    with torch.autocast(masks.device.type, enabled=False):
        products = masks @ masks.transpose(1, 2)
    squares = products.diagonal(dim1=1, dim2=2)
    dice = 2 * products / (squares[:, :, None] + squares[:, None]).clamp(min=1e-6)
    first, second = torch.triu_indices(*products.shape[1:], offset=1, device=masks.device)
    return dice[:, first, second].mean()
