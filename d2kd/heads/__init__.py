from .amd import AMDHead
from .build import DISTILL_HEAD_REGISTRY, DetectorInfo, DistillPair, build_head, head_class
from .dfmsd import DFMSDHead
from .dmkd import DMKDHead
from .mgd import MGDHead
from .mld import MLDHead
from .pkd import PKDHead
from .samkd import SAMKDHead

__all__ = [k for k in globals().keys() if not k.startswith("_")]
