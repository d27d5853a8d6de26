"""Whose attention decides what is hidden."""

from dataclasses import dataclass
from typing import Optional

from torch import Tensor

from detectron2.config import CfgNode

from ..utils.checks import check_choice, check_temperature
from .attention import channel_attention, spatial_attention

SOURCES = ("teacher", "student")


def add_attention_config(node: CfgNode) -> None:
    """Write the keys of the attention maps into the node of a head."""
    # tau, of FGD: 0.5, and 0.8 for FCOS. Larger: flatter attention.
    node.TEMPERATURE = 0.5
    # "teacher", which knows objects from the first iteration on (FGD is guided by it as well), or
    # "student"
    node.ATTENTION_FROM = "teacher"


@dataclass(frozen=True)
class AttentionGuide:
    """Attention of the teacher's or of the student's features, without gradient."""

    temperature: float = 0.5
    source: str = "teacher"

    @classmethod
    def from_config(cls, key: str, node: CfgNode) -> "AttentionGuide":
        """
        Args:
            key: of `node`, for the errors

        Raises:
            ValueError: a value outside its range
        """
        check_choice(f"{key}.ATTENTION_FROM", node.ATTENTION_FROM, SOURCES)
        check_temperature(f"{key}.TEMPERATURE", node.TEMPERATURE)
        return cls(node.TEMPERATURE, node.ATTENTION_FROM)

    def of(self, x: Tensor, target: Tensor) -> Tensor:
        """The features that guide: of the student, x, or of the teacher, target; no gradient."""
        return (target if self.source == "teacher" else x).detach()

    def cells(self, x: Tensor, target: Tensor, inside: Optional[Tensor] = None) -> Tensor:
        """
        Args:
            x, target: adapted student's and teacher's features, (N, C, H, W)
            inside: (N, 1, H, W), cells that hold a part of their image; None: all do

        Returns:
            (N, 1, H, W), mean 1 over the cells inside
        """
        return spatial_attention(self.of(x, target), self.temperature, inside)

    def channels(self, x: Tensor, target: Tensor, inside: Optional[Tensor] = None) -> Tensor:
        """As `cells`, but (N, C, 1, 1) with mean 1 over channels."""
        return channel_attention(self.of(x, target), self.temperature, inside)
