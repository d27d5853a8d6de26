from typing import Any, Dict, FrozenSet

from torch import Tensor, nn

from detectron2.config import CfgNode

from ..layers import build_adapter
from ..pairing.pair import DistillPair
from ..utils.checks import check_choice
from ..views import DetectorView, RegionSampler
from .keys import head_arguments
from .registry import DISTILL_HEAD_REGISTRY
from .roi_source import POOLERS, cells_and_key, features_of, regions_of, required_words


@DISTILL_HEAD_REGISTRY.register()
class RoIFIHead(nn.Module):
    """
    RoI feature imitation, the baseline without soft matching of G-DetKD's ablation
    (https://arxiv.org/abs/2108.07482; RECONSTRUCTED, see SGFIHead): both detectors pool a region
    from the level that its size assigns.

    Shapes: R regions; Cs, Ct student and teacher channels; S cells along a side of a RoI feature.
    """

    loss_weight = 1.0
    zero_at_equal = True  # the adapter starts as the identity

    def __init__(
        self,
        *,
        student_channels: int,
        teacher_channels: int,
        sampler: RegionSampler,
        pooler: str = "box",
    ):
        """
        Args:
            student_channels, teacher_channels: of the pyramids
            sampler: which of a dense student's boxes are its regions
            pooler: which RoI features. "box": the box head's, of the regions; "mask", our variant:
                the mask head's, of the student's proposals of objects
        """
        super().__init__()
        check_choice("pooler", pooler, POOLERS)
        self.sampler = sampler
        self.pooler = pooler
        self.adapter = build_adapter(student_channels, teacher_channels, always=True)

    @staticmethod
    def requires(cfg: CfgNode, pair: DistillPair) -> FrozenSet[str]:
        return required_words(cfg.DISTILL.RoIFI.POOLER)

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        ours, theirs, key = cells_and_key(cfg.DISTILL.RoIFI.POOLER, pair)
        if ours != theirs:
            raise ValueError(
                f"DISTILL.HEADS: RoIFI compares RoI features cell by cell, but the student's have "
                f"{ours} cells a side and the teacher's {theirs} ({key}). SGFI pools the student's "
                "anew."
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
        regions = regions_of(student, self.pooler, self.sampler)
        target = features_of(teacher, self.pooler, regions).detach().float()
        x = self.adapter(features_of(student, self.pooler, regions)).float()
        errors = (x - target).square().mean(dim=(1, 2, 3))
        return {"loss_roifi": errors.sum() / regions.mean_count}
