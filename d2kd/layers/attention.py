"""Attention maps of FGD (https://arxiv.org/abs/2111.11837), normalised to mean 1."""

from dataclasses import dataclass
from typing import List, Optional

import torch
from torch import Tensor

from ..utils.checks import check_choice, check_temperature
from .inside import mean_inside

SOURCES = ("teacher", "student", "both")


def spatial_attention(
    magnitudes: Tensor, temperature: float, inside: Optional[Tensor] = None
) -> Tensor:
    """
    Attention over cells: softmax of the mean magnitude over channels.

    Args:
        magnitudes: absolute values of features, (N, C, H, W), in float32
        temperature: divides the magnitudes, > 0; published: 0.5, and 0.8 for FCOS
        inside: (N, 1, H, W), cells inside the image; None: all

    Returns:
        (N, 1, H, W) in float32, mean 1 over the cells inside each image, 0 outside
    """
    return mean_one_softmax(magnitudes.mean(dim=1, keepdim=True), temperature, inside)


def channel_attention(
    magnitudes: Tensor, temperature: float, inside: Optional[Tensor] = None
) -> Tensor:
    """
    Attention over channels: softmax of the mean magnitude over cells.

    Args:
        magnitudes, temperature, inside: as for spatial_attention

    Returns:
        (N, C, 1, 1) in float32, mean 1 over channels
    """
    return mean_one_softmax(mean_inside(magnitudes, inside), temperature)


def mean_one_softmax(scores: Tensor, temperature: float, inside: Optional[Tensor] = None) -> Tensor:
    """
    Softmax over all but the first dimension, scaled by the number of entries to mean 1.

    Args:
        scores: (N, 1, H, W) or (N, C, 1, 1)
        temperature: divides the scores, > 0
        inside: boolean, shaped as `scores`; entries outside get 0 and are not counted
    """
    scores = scores.float() / temperature
    if inside is None:
        return scores.flatten(1).softmax(dim=1).view_as(scores) * scores[0].numel()
    # Not -inf, which gives NaN for an image without any cell inside.
    scores = scores.masked_fill(~inside, torch.finfo(scores.dtype).min)
    count = inside.flatten(1).sum(dim=1).view(-1, 1, 1, 1)
    return scores.flatten(1).softmax(dim=1).view_as(scores) * count * inside


@dataclass(frozen=True)
class AttentionGuide:
    """
    Attention of the teacher's features, the student's or both, without gradient.

    Attributes:
        temperature: tau of FGD's attention; larger values give a flatter map
        source: "teacher", "student" or "both", whose maps are averaged
    """

    temperature: float = 0.5
    source: str = "teacher"

    def __post_init__(self) -> None:
        check_temperature("temperature", self.temperature)
        check_choice("attention_from", self.source, SOURCES)

    def features(self, x: Tensor, target: Tensor) -> List[Tensor]:
        """Those of `source`: x, the adapted student's, and target, the teacher's; (N, C, H, W)."""
        features = {"student": [x], "teacher": [target], "both": [x, target]}[self.source]
        return [y.detach() for y in features]

    def magnitudes(self, x: Tensor, target: Tensor) -> List[Tensor]:
        """Of the features of `source`, which cells and channels are ranked by."""
        return [y.float().abs() for y in self.features(x, target)]

    def cells(self, magnitudes: List[Tensor], inside: Optional[Tensor] = None) -> Tensor:
        """
        Args:
            magnitudes: of :meth:`magnitudes`
            inside: (N, 1, H, W), cells inside the image; None: all

        Returns:
            (N, 1, H, W), mean 1 over the cells inside
        """
        return _mean([spatial_attention(y, self.temperature, inside) for y in magnitudes])

    def channels(self, magnitudes: List[Tensor], inside: Optional[Tensor] = None) -> Tensor:
        """As `cells`, but (N, C, 1, 1) with mean 1 over channels."""
        return _mean([channel_attention(y, self.temperature, inside) for y in magnitudes])


def _mean(maps: List[Tensor]) -> Tensor:
    return maps[0] if len(maps) == 1 else sum(maps) / len(maps)
