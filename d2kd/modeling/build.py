"""Detectron2's build_model, with errors that say whose config is wrong."""

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.modeling import build_model


def build_detector(cfg: CfgNode, source: str) -> nn.Module:
    """
    Args:
        source: what the config is of, for the error

    Raises:
        ValueError: Detectron2, which checks few values, cannot build it
    """
    try:
        return build_model(cfg)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # a KeyError, an AssertionError, ... of whatever met the value
        raise ValueError(
            f"{source}: {cfg.MODEL.META_ARCHITECTURE} cannot be built from these keys of MODEL: "
            f"{type(error).__name__}: {error}"
        ) from error
