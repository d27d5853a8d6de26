from typing import Sequence

from torch import nn

from ..pyramid import LevelPair


def build_adapters(levels: Sequence[LevelPair], always: bool = False) -> nn.ModuleDict:
    """An adapter for each pair of levels, by the student's name; see build_adapter."""
    return nn.ModuleDict(
        {p.student: build_adapter(p.student_channels, p.teacher_channels, always) for p in levels}
    )


def build_adapter(student_channels: int, teacher_channels: int, always: bool = False) -> nn.Module:
    """
    A 1x1 convolution (N, Cs, H, W) -> (N, Ct, H, W), or the identity where Cs == Ct.

    PyTorch's default initialisation, as the released code of the methods that use it.

    Args:
        always: a convolution also where Cs == Ct, so that the student may keep a basis of its own
    """
    if student_channels == teacher_channels and not always:
        return nn.Identity()
    return nn.Conv2d(student_channels, teacher_channels, kernel_size=1)
