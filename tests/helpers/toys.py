"""What the tests share: the toy detectors of d2kd.conformance, and features without a detector."""

from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import torch
from torch import nn

from d2kd.conformance.batches import batch
from d2kd.conformance.detectors import (
    DETECTORS,
    NUM_CLASSES,
    detector_config,
    distill_config,
    write_teacher,
)
from d2kd.pairing.levels import LevelPair
from d2kd.views import DetectorView

__all__ = [
    "DETECTORS",
    "GROUP_NORM",
    "NUM_CLASSES",
    "ROOT",
    "FeatureView",
    "batch",
    "detector_config",
    "distill_config",
    "feature_view",
    "level_pairs",
    "noise",
    "stock_backbone",
    "write_teacher",
]

ROOT = str(Path(__file__).resolve().parents[2])

# GroupNorm has no running averages, so eval mode is sane without training. It makes 32 groups.
GROUP_NORM = {
    "MODEL__RESNETS__NORM": "GN",
    "MODEL__RESNETS__WIDTH_PER_GROUP": 32,
    "MODEL__RESNETS__STEM_OUT_CHANNELS": 32,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 32,
    "MODEL__FPN__NORM": "",
}


def stock_backbone(name: str) -> Dict[str, str]:
    """An override of a toy detector, for processes that know Detectron2 alone."""
    shallow = DETECTORS[name]["MODEL.BACKBONE.NAME"]
    return {"MODEL__BACKBONE__NAME": shallow.replace("shallow_", "")}


def level_pairs(**channels: Tuple[int, int]) -> Tuple[LevelPair, ...]:
    """Pairs of levels of one name and stride: level_pairs(p3=(Cs, Ct)) has the stride 2 ** 3."""
    return tuple(
        LevelPair(k, k, s, t, 2 ** int(k[1:]), 2 ** int(k[1:])) for k, (s, t) in channels.items()
    )


class FeatureView(DetectorView):
    """What a head that reads features alone needs of a DetectorView, without a detector."""

    def __init__(self, features: Mapping[str, torch.Tensor], image_sizes: Sequence[Any] = ()):
        super().__init__(nn.Module())
        self._features = features
        self._image_sizes = image_sizes

    @property
    def features(self) -> Mapping[str, torch.Tensor]:
        return self._features

    @property
    def strides(self) -> Dict[str, int]:
        return {k: 2 ** int(k[1:]) for k in self._features}

    @property
    def image_sizes(self) -> List[Tuple[int, int]]:
        if self._image_sizes:
            return list(self._image_sizes)
        level, x = next(iter(self._features.items()))
        height, width = (size * self.strides[level] for size in x.shape[-2:])
        return [(height, width)] * len(x)


def feature_view(
    features: Mapping[str, torch.Tensor], image_sizes: Sequence[Tuple[int, int]] = ()
) -> FeatureView:
    """
    Args:
        features: level name to (N, C, H, W); "p3" has the stride 2 ** 3
        image_sizes: (height, width) of each image in pixels; empty: no padding
    """
    return FeatureView(features, image_sizes)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal values in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
