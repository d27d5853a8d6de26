import math
from typing import Dict, List, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import AttentionGuide, DualGenerator, MaskRule, build_adapters, squared_error
from ..pairing.levels import LevelPair, match_inside
from ..utils.checks import check_choice, check_range
from ..views import DetectorView
from .registry import DISTILL_HEAD_REGISTRY
from .samkd_scales import HIERARCHIES, Scale


@DISTILL_HEAD_REGISTRY.register()
class SAMKDHead(nn.Module):
    """
    Scale-aware masked distillation of features, https://arxiv.org/abs/2501.07101 (RECONSTRUCTED
    from the abstracts of versions 1, "Dual Scale-aware AMKD", and 2, "SAMKD"; no code was
    released): DMKD's dual masking from coarse to fine, with more weight on the scales where the
    student lags. Its logits part is the head MLD.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i.

    Attributes:
        loss_weight: alpha: MGD's (5e-7 for a two-stage student)
    """

    loss_weight = 2e-5
    sums_over_cells = True

    def __init__(
        self,
        *,
        levels: Sequence[LevelPair],
        hierarchy: str = "pool",
        scales: Sequence[int] = (1, 2, 4),
        min_cells: int = 4,
        cell_mask: MaskRule = MaskRule(),
        channel_mask: MaskRule = MaskRule(ratio=0.5),
        temperature: float = 0.5,
        attention_from: str = "teacher",
    ):
        """
        Args:
            levels: the pairs of levels to distil
            hierarchy: "pool": version 1's max-pooling by each of the scales, cheap; "window": the
                region-wise reading of version 2, whole maps whose cells compete for attention
                within each of scale x scale windows, at the cost of a generator's pass for each
                scale
            scales: K, whole numbers with 1 among them; each of [1, 2, 4] halves the map or the
                window
            min_cells: a scale is left out where it leaves fewer cells along a side (of the map, or
                of a window): too few to mask a ratio of them
            cell_mask: which cells are hidden, given the attention; its ratio is MGD's (0.45 for a
                two-stage student)
            channel_mask: which channels; half of them leaves enough to mix the others from
            temperature: tau of FGD's attention: 0.5, and 0.8 for FCOS; larger: flatter
            attention_from: "teacher", which knows objects from the first iteration on, "student",
                or the mean of "both"
        """
        super().__init__()
        check_choice("hierarchy", hierarchy, sorted(HIERARCHIES))
        whole = all(isinstance(k, int) and k > 0 for k in scales)
        if not whole or 1 not in scales or len(set(scales)) < len(scales):
            raise ValueError(
                "scales must be different whole numbers above 0 with 1 among them, such as "
                f"[1, 2, 4], got {list(scales)}."
            )
        check_range("min_cells", min_cells, 1, math.inf)
        self.levels = levels
        self.hierarchy = HIERARCHIES[hierarchy]
        self.scales = sorted(scales)
        self.min_cells = min_cells
        self.cell_mask = cell_mask
        self.channel_mask = channel_mask
        self.guide = AttentionGuide(temperature, attention_from)
        self.adapter = build_adapters(levels)
        # Shared by the scales of a level: the same 3x3 kernels see more of the image on each.
        self.generator = nn.ModuleDict(
            {p.student: DualGenerator(p.teacher_channels) for p in levels}
        )

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        ::

            e_k = 1/N sum of (T_k - generator(X_k, masks))^2 at scale k;  X = adapter(S)
            w_k = softmax over k of lag_k / mean lag,  lag_k = mean |X_k - T_k|
            loss = sum over k of w_k a_k e_k,  a_k = k^2 where maps are pooled by k, 1 for windows

        Args:
            student, teacher: views with features S (N, Cs, Hi, Wi) and T (N, Ct, Hi, Wi)

        Returns:
            {"loss_samkd": {level: scalar}}: each error is summed over channels and the cells inside
            the images and averaged over images; of MGD's size
        """
        losses, self.maps = {}, {f"visible {k}": {} for k in self.scales}
        for level, x, target, inside in match_inside(self.levels, student, teacher):
            x, errors, lags = self.adapter[level](x), [], []
            scales = [
                self.hierarchy.scale(k, x, target, inside) for k in self._sizes(student, level)
            ]
            outputs = self.generator[level].outputs()
            for scale in scales:
                magnitudes = self.guide.magnitudes(scale.x, scale.target)
                cells = self.hierarchy.visible(scale, magnitudes, self.guide, self.cell_mask)
                channels = self.channel_mask(self.guide.channels(magnitudes, scale.inside))
                rebuilt = self.generator[level](scale.x, cells, channels, scale.inside, outputs)
                errors.append(squared_error(rebuilt, scale.target, scale.inside, scale.area))
                if len(scales) > 1:
                    lags.append(_lag(scale, self.hierarchy.judged(scale, cells)))
                self.maps[f"visible {scale.size}"][level] = cells
            losses[level] = lag_weights(lags).dot(torch.stack(errors)) if lags else errors[0]
        return {"loss_samkd": losses}

    def _sizes(self, student: DetectorView, level: str) -> List[int]:
        """The scales of a level that leave enough cells of the images, fine to coarse."""
        largest = [max(sides) for sides in zip(*student.image_sizes)]
        cells = min(math.ceil(side / student.strides[level]) for side in largest)
        return [k for k in self.scales if k == 1 or cells / k >= self.min_cells]


def _lag(scale: Scale, cells: Optional[Tensor]) -> Tensor:
    """How far the student is from the teacher: mean over these cells; None: over all."""
    x, target = scale.x.detach().float(), scale.target.float()
    if cells is None:
        return F.l1_loss(x, target)
    distance = (x - target).abs().mean(1, keepdim=True)
    return (distance * cells).sum() / cells.sum().clamp(min=1)


def lag_weights(lags: Sequence[Tensor]) -> Tensor:
    """Softmax of the lags relative to their mean: sum 1, however many scales a level has."""
    lags = torch.stack(list(lags))
    return (lags / lags.mean().clamp(min=1e-12)).softmax(dim=0)
