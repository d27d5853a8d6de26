"""RepPoints (https://arxiv.org/abs/1904.11490), which Detectron2 does not have."""

from .detector import RepPoints

__all__ = ["RepPoints"]
