from .base import DETECTOR_VIEW_REGISTRY, DetectorView, find_view  # noqa isort:skip
from .dense import DenseView
from .rcnn import RCNNView

__all__ = [k for k in globals().keys() if not k.startswith("_")]
