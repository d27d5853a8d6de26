from typing import Dict, Optional, Sequence

from torch import Tensor, nn

from ..layers import (
    AttentionGuide,
    Generator,
    MaskRule,
    build_adapters,
    mean_inside,
    squared_error,
)
from ..pairing.levels import LevelPair, match_inside
from ..views import DetectorView
from .registry import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class AMDHead(nn.Module):
    """
    Adaptive Masked Distillation, https://arxiv.org/abs/2301.13538 (RECONSTRUCTED from the abstract;
    no code was released): as MGD, but the cells that it hides are drawn where the teacher attends,
    and a small module weighs the channels of what the generator rebuilds.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i.

    Attributes:
        loss_weight: alpha: MGD's (5e-7 for a two-stage student), since the abstract reports gains
            over MGD in MGD's setting
    """

    loss_weight = 2e-5
    sums_over_cells = True

    def __init__(
        self,
        *,
        levels: Sequence[LevelPair],
        mask: MaskRule = MaskRule(),
        temperature: float = 0.5,
        attention_from: str = "teacher",
        adapt_channels: bool = True,
    ):
        """
        Args:
            levels: the pairs of levels to distil
            mask: which cells are hidden, given the attention; its ratio is MGD's (0.45 for a
                two-stage student)
            temperature: tau of FGD's attention: 0.5, and 0.8 for FCOS; larger: flatter
            attention_from: "teacher", which knows objects from the first iteration on (FGD is
                guided by it as well), "student", or the mean of "both"
            adapt_channels: weigh the channels of the rebuilt features: the "simple and efficient"
                module of the abstract, here squeeze and excitation
        """
        super().__init__()
        self.levels = levels
        self.mask = mask
        self.guide = AttentionGuide(temperature, attention_from)
        self.adapter = build_adapters(levels)
        self.generator = nn.ModuleDict({p.student: Generator(p.teacher_channels) for p in levels})
        gated = levels if adapt_channels else ()
        self.gate = nn.ModuleDict({p.student: ChannelGate(p.teacher_channels) for p in gated})

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        ::

            X = adapter(S),  visible = mask(attention(T))
            loss = 1/N sum over n, c, cells inside of (T - gate(X) * generator(X * visible))^2

        Args:
            student, teacher: views with features S (N, Cs, Hi, Wi) and T (N, Ct, Hi, Wi)

        Returns:
            {"loss_amd": {level: scalar}}: squared error summed over channels and the cells inside
            the images, averaged over images, as MGD's
        """
        losses, self.maps = {}, {"visible": {}}
        for level, x, target, inside in match_inside(self.levels, student, teacher):
            x = self.adapter[level](x)
            magnitudes = self.guide.magnitudes(x, target)
            visible = self.mask(self.guide.cells(magnitudes, inside), inside)  # (N, 1, Hi, Wi)
            rebuilt = self.generator[level](x * visible, inside)
            if level in self.gate:
                rebuilt = rebuilt * self.gate[level](x, inside)
            losses[level] = squared_error(rebuilt, target, inside)
            self.maps["visible"][level] = visible
        return {"loss_amd": losses}


class ChannelGate(nn.Module):
    """Squeeze and excitation, https://arxiv.org/abs/1709.01507: a weight in (0, 1) per channel."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // 16, 1)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)
        # Starts as plain masked generation: sigmoid(2) = 0.88 for every channel alike.
        nn.init.zeros_(self.excite.weight)
        nn.init.constant_(self.excite.bias, 2.0)

    def forward(self, x: Tensor, inside: Optional[Tensor] = None) -> Tensor:
        """(N, C, H, W) -> (N, C, 1, 1)"""
        pooled = mean_inside(x, inside).flatten(1)
        return self.excite(self.squeeze(pooled).relu()).sigmoid()[:, :, None, None]
