from typing import Dict, Sequence

from torch import Tensor, nn

from ..layers import AttentionGuide, DualGenerator, MaskRule, build_adapters, squared_error
from ..pairing.levels import LevelPair, match_inside
from ..views import DetectorView
from .registry import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class DMKDHead(nn.Module):
    """
    Dual Masked Knowledge Distillation, https://arxiv.org/abs/2309.02719 (RECONSTRUCTED from the
    abstract; no code was released): hide cells from one generator and channels from another, both
    drawn by the teacher's attention, and fuse what the two rebuild by learned weights.

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
        cell_mask: MaskRule = MaskRule(),
        channel_mask: MaskRule = MaskRule(ratio=0.5),
        temperature: float = 0.5,
        attention_from: str = "teacher",
    ):
        """
        Args:
            levels: the pairs of levels to distil
            cell_mask: which cells are hidden, given the attention; its ratio is MGD's (0.45 for a
                two-stage student)
            channel_mask: which channels; half of them leaves enough for the generator to mix the
                others from
            temperature: tau of FGD's attention: 0.5, and 0.8 for FCOS; larger: flatter
            attention_from: "teacher", which knows objects from the first iteration on (FGD is
                guided by it as well), "student", or the mean of "both"
        """
        super().__init__()
        self.levels = levels
        self.cell_mask = cell_mask
        self.channel_mask = channel_mask
        self.guide = AttentionGuide(temperature, attention_from)
        self.adapter = build_adapters(levels)
        self.generator = nn.ModuleDict(
            {p.student: DualGenerator(p.teacher_channels) for p in levels}
        )

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        ::

            X = adapter(S),  w = softmax of two learned numbers
            rebuilt = w1 generator1(X * visible cells) + w2 generator2(X * visible channels)
            loss = 1/N sum over n, c, cells inside of (T - rebuilt)^2

        Args:
            student, teacher: views with features S (N, Cs, Hi, Wi) and T (N, Ct, Hi, Wi)

        Returns:
            {"loss_dmkd": {level: scalar}}: squared error summed over channels and the cells inside
            the images, averaged over images, as MGD's
        """
        losses, self.maps = {}, {"visible": {}}
        for level, x, target, inside in match_inside(self.levels, student, teacher):
            x = self.adapter[level](x)
            magnitudes = self.guide.magnitudes(x, target)
            cells = self.cell_mask(self.guide.cells(magnitudes, inside), inside)  # (N, 1, Hi, Wi)
            channels = self.channel_mask(self.guide.channels(magnitudes, inside))  # (N, Ct, 1, 1)
            rebuilt = self.generator[level](x, cells, channels, inside)
            losses[level] = squared_error(rebuilt, target, inside)
            self.maps["visible"][level] = cells
        return {"loss_dmkd": losses}
