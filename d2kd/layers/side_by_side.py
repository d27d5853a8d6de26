"""
The levels of a pyramid as one map: an operator on all of them is one launch on a GPU, where small
maps take longer to launch than to compute.
"""

from typing import Iterator, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..pairing.levels import LevelPair, match_levels
from ..views import DetectorView


def side_by_side(maps: Sequence[Tensor]) -> Tensor:
    """(N, C, Hi, Wi) of each level -> (N, C, 1, sum of Hi*Wi)"""
    return torch.cat([x.flatten(2) for x in maps], dim=2)[:, :, None]


def match_side_by_side(
    pairs: Sequence[LevelPair], student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> Tuple[Tensor, Tensor]:
    """match_levels with the levels of each detector side by side."""
    _, ours, theirs = zip(*match_levels(pairs, student, teacher))
    return side_by_side(ours), side_by_side(theirs)


def inside_side_by_side(view: DetectorView, maps: Mapping[str, Tensor]) -> Optional[Tensor]:
    """
    Args:
        maps: of levels by name, which may have been cropped, (N, C, Hi, Wi)

    Returns:
        boolean (N, 1, 1, sum of Hi*Wi), cells that hold a part of their image; None: all do
    """
    inside = {level: view.inside_image(level, like=x) for level, x in maps.items()}
    if all(x is None for x in inside.values()):
        return None
    return side_by_side(
        [
            torch.ones_like(x[:, :1], dtype=torch.bool) if inside[level] is None else inside[level]
            for level, x in maps.items()
        ]
    )


def each_level(x: Tensor, maps: Mapping[str, Tensor]) -> Iterator[Tuple[str, Tensor]]:
    """
    Yield the name and the part of each level.

    Args:
        x: of these levels side by side, (..., sum of Hi*Wi)
        maps: of the levels, (N, C, Hi, Wi)
    """
    sizes = [level.shape[-2] * level.shape[-1] for level in maps.values()]
    return zip(maps, x.split(sizes, dim=-1))
