from typing import Sequence

from torch import nn

from ..pairing.levels import LevelPair


def build_adapters(levels: Sequence[LevelPair], always: bool = False) -> nn.ModuleDict:
    """One adapter per level pair, by the name of the student level; see build_adapter."""
    return nn.ModuleDict(
        {
            p.student: build_adapter(
                p.student_channels, p.teacher_channels, always or p.adapt_equal
            )
            for p in levels
        }
    )


def build_adapter(student_channels: int, teacher_channels: int, always: bool = False) -> nn.Module:
    """
    A 1x1 convolution (N, Cs, H, W) -> (N, Ct, H, W), or the identity where Cs == Ct.

    Uses PyTorch's default initialisation, like the released code of the methods that use it.

    Args:
        always: use a convolution even if Cs == Ct, so that the student may learn a different basis;
            it starts as the identity, because a student that inherits has the teacher's basis
    """
    if student_channels == teacher_channels and not always:
        return nn.Identity()
    adapter = nn.Conv2d(student_channels, teacher_channels, kernel_size=1)
    if student_channels == teacher_channels:
        nn.init.dirac_(adapter.weight)
        nn.init.zeros_(adapter.bias)
    return adapter
