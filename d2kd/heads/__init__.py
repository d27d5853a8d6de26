from .build import DISTILL_HEAD_REGISTRY, DetectorInfo, DistillPair, build_head, head_class
from .mgd import MGDHead
from .pkd import PKDHead

__all__ = [k for k in globals().keys() if not k.startswith("_")]
