"""d2kd: distillation of object detectors inside Detectron2. Importing it registers everything."""

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    raise ModuleNotFoundError(
        "d2kd needs Detectron2, which is not installed. Install it as its own installation page "
        "says (https://detectron2.readthedocs.io/en/latest/tutorials/install.html), or run "
        "`pip install -c constraints.txt ./third_party/detectron2` in d2kd's repository: that "
        "builds v0.5 from PyPI without a compiler.",
        name="detectron2",
    ) from None

from .config import add_distill_config, load_config, student_config
from .distiller import Distiller
from .heads import DISTILL_HEAD_REGISTRY
from .layers import build_adapters
from .pairing.levels import match_levels
from .teacher import Teacher, build_teacher
from .views import DETECTOR_VIEW_REGISTRY, DetectorView

__version__ = "0.2.0"
__all__ = [
    "DETECTOR_VIEW_REGISTRY",
    "DISTILL_HEAD_REGISTRY",
    "DetectorView",
    "Distiller",
    "Teacher",
    "add_distill_config",
    "build_adapters",
    "build_teacher",
    "load_config",
    "match_levels",
    "student_config",
]
