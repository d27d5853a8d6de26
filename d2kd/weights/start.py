"""Which files a run starts from: weights, and the configs of its teachers."""

import hashlib
import os
from typing import List

from detectron2.config import CfgNode

from ..utils.distils import distils
from ..utils.packaged import find_file
from ..utils.safe_yaml import read_yaml
from ..utils.sha256 import sha256_of


def starting_weights(cfg: CfgNode) -> List[str]:
    """
    Returns:
        paths of the student's weights and of those of all its teachers, as far as they are files
        here; a run with others of the same name is another run
    """
    is_distilled = cfg.MODEL.META_ARCHITECTURE == "Distiller"
    return _files([cfg.MODEL.WEIGHTS, *(_of_teachers(cfg, "WEIGHTS") if is_distilled else ())])


def teacher_digests(cfg: CfgNode) -> List[str]:
    """
    Returns:
        a hash of each teacher's config, of a YAML with what its _BASE_ says; none without teachers,
        and none of Detectron2's model zoo

    Raises:
        ValueError: one is not YAML
    """
    files = _files(_of_teachers(cfg, "CONFIG_FILE")) if distils(cfg) else []
    return [
        (
            sha256_of(x)
            if x.endswith(".py")
            else hashlib.sha256(repr(read_yaml(x)).encode()).hexdigest()
        )
        for x in files
    ]


def _of_teachers(cfg: CfgNode, key: str) -> List[str]:
    """A key of DISTILL.TEACHER, of all teachers of a run."""
    entries = [x for x in (*cfg.DISTILL.STAGES, *cfg.DISTILL.TEACHERS) if isinstance(x, dict)]
    teachers = (cfg.DISTILL.TEACHER, *(x.get("TEACHER") or {} for x in entries))
    return [x.get(key) for x in teachers]


def _files(named: List[str]) -> List[str]:
    found = [find_file(x) for x in named if x]
    return [x for x in found if os.path.isfile(x)]
