from typing import Any, Dict

from torch import Tensor, nn

from detectron2.config import CfgNode

from ..layers import build_adapter
from ..pairing.pair import DistillPair
from ..views import DetectorView, RegionSampler
from .keys import head_arguments
from .registry import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class RoIFIHead(nn.Module):
    """
    RoI feature imitation, the baseline without soft matching of G-DetKD's ablation
    (https://arxiv.org/abs/2108.07482; RECONSTRUCTED, see SGFIHead): both detectors pool a region
    from the level that its size assigns.

    Shapes: R regions; Cs, Ct student and teacher channels; S cells along a side of a RoI feature.
    """

    requires = frozenset({"features", "roi_features", "regions"})
    loss_weight = 1.0
    zero_at_equal = True  # the adapter starts as the identity

    def __init__(self, *, student_channels: int, teacher_channels: int, sampler: RegionSampler):
        """
        Args:
            student_channels, teacher_channels: of the pyramids
            sampler: which of a dense student's boxes are its regions
        """
        super().__init__()
        self.sampler = sampler
        self.adapter = build_adapter(student_channels, teacher_channels, always=True)

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        sizes = pair.student.roi_size, pair.teacher.roi_size
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"DISTILL.HEADS: RoIFI compares RoI features cell by cell, but the student's have "
                f"{sizes[0]} cells a side and the teacher's {sizes[1]} "
                "(MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION). SGFI pools the student's anew."
            )
        channels = pair.student.channels, pair.teacher.channels
        return head_arguments(
            cls, cfg, pair, student_channels=channels[0], teacher_channels=channels[1]
        )

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        """
        ::

            loss = 1/R sum over r of mean over c, cells of (T_r - adapter(S_r))^2

        Args:
            student, teacher: views with RoI features, (R, Cs, S, S) and (R, Ct, S, S)

        Returns:
            {"loss_roifi": scalar}, the squared error averaged over a region's entries and regions
        """
        regions = student.regions(self.sampler)
        target = teacher.roi_features(regions.boxes).detach().float()
        x = self.adapter(student.roi_features(regions.boxes)).float()
        errors = (x - target).square().mean(dim=(1, 2, 3))
        return {"loss_roifi": errors.sum() / regions.mean_count}
