from typing import Dict, Sequence

import torch
from torch import Tensor, nn

from ..layers import Generator, build_adapters, squared_error
from ..pairing.levels import LevelPair, match_levels
from ..views import DetectorView
from .registry import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class MGDHead(nn.Module):
    """
    Masked Generative Distillation, https://arxiv.org/abs/2205.01529 (exact, after the authors'
    released code): hide random positions of the student's features and have a small generator
    rebuild the teacher's whole features from the rest.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i.

    Attributes:
        loss_weight: alpha; published, for 800x1344 inputs: 2e-5 for a dense student, 5e-7 for a
            two-stage one
    """

    loss_weight = 2e-5
    sums_over_cells = True

    def __init__(self, *, levels: Sequence[LevelPair], mask_ratio: float = 0.65):
        """
        Args:
            levels: the pairs of levels to distil
            mask_ratio: lambda: probability of hiding a position, in [0, 1); published: 0.65 dense,
                0.45 two-stage
        """
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise ValueError(
                f"mask_ratio must be in [0, 1), got {mask_ratio}: it is the probability of hiding "
                "a position (0.65 for dense detectors, 0.45 for two-stage)."
            )
        self.levels = levels
        self.mask_ratio = mask_ratio
        self.adapter = build_adapters(levels)
        self.generator = nn.ModuleDict({p.student: Generator(p.teacher_channels) for p in levels})

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        ::

            loss = 1/N sum over n, c, cells of (T - generator(adapter(S) * visible))^2
            visible ~ Bernoulli(1 - mask_ratio), one draw per cell

        Args:
            student, teacher: views with features S (N, Cs, Hi, Wi) and T (N, Ct, Hi, Wi)

        Returns:
            {"loss_mgd": {level: scalar}}: squared error summed over channels and positions,
            averaged over images. The published weights assume this reduction.
        """
        losses, self.maps = {}, {"visible": {}}
        for level, x, target in match_levels(self.levels, student.features, teacher.features):
            x = self.adapter[level](x)
            # One draw per position for all channels: otherwise they would give each other away.
            # Not in float16, which has 2048 numbers to draw.
            dtype = torch.promote_types(x.dtype, torch.float32)
            drawn = torch.rand_like(x[:, :1], dtype=dtype)
            visible = drawn >= self.mask_ratio  # (N, 1, Hi, Wi)
            rebuilt = self.generator[level](x * visible)
            # Padding counts here, as in the released code.
            losses[level] = squared_error(rebuilt, target)
            self.maps["visible"][level] = visible
        return {"loss_mgd": losses}
