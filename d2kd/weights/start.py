"""Which files of weights a run starts from."""

import os
from typing import List

from detectron2.config import CfgNode

from ..utils.packaged import find_file


def starting_weights(cfg: CfgNode) -> List[str]:
    """
    Returns:
        paths of the student's weights and of those of all its teachers, as far as they are files
        here; a run with others of the same name is another run
    """
    entries = [x for x in (*cfg.DISTILL.STAGES, *cfg.DISTILL.TEACHERS) if isinstance(x, dict)]
    teachers = (cfg.DISTILL.TEACHER, *(x.get("TEACHER") or {} for x in entries))
    is_distilled = cfg.MODEL.META_ARCHITECTURE == "Distiller"
    named = [cfg.MODEL.WEIGHTS, *(x.get("WEIGHTS") for x in teachers if is_distilled)]
    found = [find_file(x) for x in named if x]
    return [x for x in found if os.path.isfile(x)]
