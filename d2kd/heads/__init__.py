from ..pairing.pair import DistillPair
from ..views import DetectorInfo
from .acamkd import ACAMKDHead
from .amd import AMDHead
from .bckd import BCKDHead
from .build import build_head
from .cankd import CanKDHead
from .ckd import CKDHead
from .crosskd import CrossKDHead
from .cwd import CWDHead
from .dcsfkd import DCSFKDHead
from .dfmsd import DFMSDHead
from .dist import DISTHead
from .dkd import DKDHead
from .dmkd import DMKDHead
from .fgd import FGDHead
from .keys import head_arguments
from .mar import MARHead
from .mgd import MGDHead
from .mld import MLDHead
from .pkd import PKDHead
from .registry import DISTILL_HEAD_REGISTRY, head_class, head_names
from .reviewkd import ReviewKDHead
from .roi_cls import RoIClsHead
from .roi_fi import RoIFIHead
from .roi_loc import RoILocHead
from .roi_mask import RoIMaskHead
from .samkd import SAMKDHead
from .sgfi import SGFIHead

__all__ = [k for k in globals().keys() if not k.startswith("_")]
