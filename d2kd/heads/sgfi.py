from functools import partial
from typing import Any, Callable, Dict, FrozenSet, List, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from detectron2.config import CfgNode
from detectron2.structures import Boxes

from ..layers import build_adapter
from ..pairing.pair import DistillPair
from ..utils.checks import check_choice, check_range
from ..views import DetectorView, RegionSampler, roi_align_levels
from .keys import head_arguments
from .registry import DISTILL_HEAD_REGISTRY
from .roi_source import POOLERS, cells_and_key, features_of, regions_of, required_words

# A learned temperature below this would make the softmax a hard choice that nothing can undo.
MIN_TEMPERATURE = 0.01


@DISTILL_HEAD_REGISTRY.register()
class SGFIHead(nn.Module):
    """
    Semantic-Guided Feature Imitation of G-DetKD, https://arxiv.org/abs/2108.07482 (RECONSTRUCTED
    from the abstract, a reader's notes and re-implementations; no code was released): of each
    region, the teacher's RoI feature, from the level that its size assigns, is imitated by a
    mixture of the student's from all levels. An embedding of both says which levels match.

    Shapes: R regions; L student levels; C teacher channels, which the adapter gives the student's
    features too; S cells along a side of the teacher's RoI features.

    Attributes:
        loss_weight: lambda_feat, of an error that is a mean
    """

    loss_weight = 1.0
    no_weight_decay = frozenset({"temperature"})

    def __init__(
        self,
        *,
        student_levels: Sequence[str],
        student_channels: int,
        teacher_channels: int,
        sampler: RegionSampler,
        pooler: str = "box",
        levels: Sequence[str] = (),
        negative_slope: float = 0.0,
        sampling_ratio: int = 0,
        chunk_size: int = 0,
    ):
        """
        Args:
            student_levels: all of the student's
            student_channels, teacher_channels: of the pyramids
            sampler: which of a dense student's boxes are its regions
            pooler: which of the teacher's RoI features. "box": the box head's, of the regions;
                "mask", our variant: the mask head's, of the student's proposals of objects
            levels: those of the student that are mixed; empty: all
            negative_slope: of the embedding's ReLUs, in [0, 1). The notes on the paper say ReLU, 0.
                With a large LOSS_WEIGHT that died: all levels weigh the same then, for good; 0.01
                lets it come back
            sampling_ratio: points per cell and direction of the student's RoIAlign, up to 8. 0: one
                per map cell, as in Detectron2's box heads; 2: faster where large boxes meet fine
                levels
            chunk_size: regions at a time. The student's RoI features are R x L x C x S x S numbers:
                257 MB in float32 for 1024 regions of 5 levels of 256 channels, twice that while
                they are stacked. With 128 here, that many regions are pooled at a time, and once
                more in the backward; 0: all at once
        """
        super().__init__()
        chosen = list(levels) or list(student_levels)
        if not all(x in student_levels for x in chosen) or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"levels is {chosen}; it may name each of {', '.join(student_levels)} once."
            )
        if not 0 <= negative_slope < 1:
            raise ValueError(f"negative_slope must be in [0, 1), got {negative_slope}.")
        check_range("sampling_ratio", sampling_ratio, 0, 8, "time and memory grow with its square")
        check_range("chunk_size", chunk_size, 0, 10**6, "0 is all at once")
        check_choice("pooler", pooler, POOLERS)
        self.student_levels = chosen
        self.pooler = pooler
        self.sampler = sampler
        self.sampling_ratio = sampling_ratio
        self.chunk_size = chunk_size
        self.adapter = build_adapter(student_channels, teacher_channels, always=True)
        self.embedding = nn.Sequential(  # S = 7 cells -> 3 -> 1
            nn.Conv2d(teacher_channels, teacher_channels // 2, kernel_size=3, stride=2),
            nn.LeakyReLU(negative_slope, inplace=True),
            nn.Conv2d(teacher_channels // 2, teacher_channels // 4, kernel_size=3, stride=2),
            nn.LeakyReLU(negative_slope, inplace=True),
        )
        self.temperature = nn.Parameter(torch.ones(()))
        # Of the latest batch, for pictures: mixture weights (R, L) and the regions they belong to.
        self.latest_weights: Tuple[Tensor, List[Boxes]] = (
            torch.empty(0, len(self.student_levels)),
            [],
        )

    @staticmethod
    def requires(cfg: CfgNode, pair: DistillPair) -> FrozenSet[str]:
        return required_words(cfg.DISTILL.SGFI.POOLER)

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        _, cells, key = cells_and_key(cfg.DISTILL.SGFI.POOLER, pair)
        if cells < 7:
            raise ValueError(
                f"DISTILL.HEADS: SGFI embeds RoI features of 7 cells a side or more; the teacher's "
                f"have {cells} ({key})."
            )
        return head_arguments(
            cls,
            cfg,
            pair,
            student_levels=list(pair.student.shapes),
            student_channels=pair.student.channels,
            teacher_channels=pair.teacher.channels,
        )

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        """
        ::

            e = embedding(RoI feature),  w_r = softmax over l of <e(S_r,l), e(T_r)> / temperature
            loss = 1/R sum over r of mean over c, cells of (T_r - sum over l of w_r,l S_r,l)^2

        Args:
            student, teacher: views with RoI features; S_r,l are pooled of the adapted maps

        Returns:
            {"loss_sgfi": scalar}, averaged over a region's C*S*S entries and over regions (of all
            processes)
        """
        # Not in the graph, where a clamp would cut the gradient for good.
        self.temperature.data.clamp_(min=MIN_TEMPERATURE)
        regions = regions_of(student, self.pooler, self.sampler)
        target = features_of(teacher, self.pooler, regions).detach()
        # RoIAlign averages cells and a 1x1 convolution mixes channels, so they commute. Maps have
        # fewer cells than many regions on all levels, and only one tensor of that size is kept.
        maps = [self.adapter(student.features[k]) for k in self.student_levels]
        strides = [student.strides[k] for k in self.student_levels]
        imitate = partial(self._imitate, strides)
        errors, weights = in_chunks(imitate, self.chunk_size, (regions.rois, target), *maps)
        self.latest_weights = weights.detach(), regions.boxes
        return {"loss_sgfi": errors.sum() / regions.mean_count}

    def _imitate(
        self, strides: List[int], rois: Tensor, target: Tensor, *maps: Tensor
    ) -> Tuple[Tensor, Tensor]:
        """
        Args:
            rois, target: (R, 5) and (R, C, S, S)
            maps: adapted features of L levels, (N, C, Hi, Wi)

        Returns:
            mean squared error of each region (R,), and the weights of its levels (R, L)
        """
        # (R, L, C, S, S)
        pooled = roi_align_levels(maps, strides, rois, target.shape[-2:], self.sampling_ratio)
        ours = self.embedding(pooled.flatten(0, 1)).float().flatten(1)
        theirs = self.embedding(target).float().flatten(1)
        ours = ours.unflatten(0, pooled.shape[:2])  # (R, L, D)
        similarity = (ours * theirs[:, None]).sum(dim=2)  # (R, L)
        weights = F.softmax(similarity / self.temperature, dim=1)
        mixture = torch.bmm(weights[:, None].to(pooled), pooled.flatten(2))  # (R, 1, C*S*S)
        return (mixture[:, 0].float() - target.float().flatten(1)).square().mean(dim=1), weights


def in_chunks(
    function: Callable[..., Tuple[Tensor, ...]], size: int, rows: Sequence[Tensor], *shared: Tensor
) -> Tuple[Tensor, ...]:
    """
    function(*rows, *shared), of `size` rows at a time, to save memory: each chunk is computed again
    in the backward.

    Args:
        function: returns tensors of as many rows; it draws no random numbers
        size: 0: all rows at once, computed once
        rows: tensors of equal length
    """
    if not size:
        return function(*rows, *shared)
    chunks = [
        checkpoint(function, *chunk, *shared, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(*(x.split(size) for x in rows))
    ]
    return tuple(torch.cat(x) for x in zip(*chunks))
