from .base import DETECTOR_VIEW_REGISTRY, DetectorView, find_view  # noqa isort:skip
from .anchors import ReorderedAnchorsView, anchor_order
from .common_classes import CommonClassesView, MergeClasses
from .dense import DenseView
from .info import DetectorInfo
from .parts import roi_align_levels
from .rcnn import RCNNView
from .region_sampler import RegionSampler
from .regions import Regions

__all__ = [k for k in globals().keys() if not k.startswith("_")]
