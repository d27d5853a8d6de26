from .amd import AMDHead
from .build import DISTILL_HEAD_REGISTRY, DetectorInfo, DistillPair, build_head, head_class
from .ckd import CKDHead
from .dfmsd import DFMSDHead
from .dmkd import DMKDHead
from .mgd import MGDHead
from .mld import MLDHead
from .pkd import PKDHead
from .roi_cls import RoIClsHead
from .roi_fi import RoIFIHead
from .roi_loc import RoILocHead
from .samkd import SAMKDHead
from .sgfi import SGFIHead

__all__ = [k for k in globals().keys() if not k.startswith("_")]
