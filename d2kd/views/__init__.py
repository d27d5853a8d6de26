from .base import DetectorView  # noqa isort:skip
from .anchor_labels import AnchorLabels
from .anchors import ReorderedAnchorsView, anchor_order
from .backbone import BackboneView
from .build import DETECTOR_VIEW_REGISTRY, describe_detector, find_view
from .common_classes import CommonClassesView, MergeClasses
from .dense import DenseView, exact_boxes
from .detector_info import DetectorInfo
from .handed_on import HandedOnView
from .lazy_levels import LazyLevels
from .predictions import DensePredictions, RoIPredictions
from .rcnn import RCNNView
from .region_sampler import RegionSampler
from .regions import Regions
from .reppoints import RepPointsView
from .roi_align import roi_align_levels
from .towers import Towers

__all__ = [k for k in globals().keys() if not k.startswith("_")]
