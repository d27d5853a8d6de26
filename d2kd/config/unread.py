"""Find overrides of known keys that have no effect in this config."""

from fnmatch import fnmatchcase
from typing import AbstractSet, Any, List, Sequence

from detectron2.config import CfgNode

from ..heads.fit import OF_BOXES
from ..heads.registry import head_class, head_names
from ..utils.distils import distils
from . import leaves, load_config, student_config
from .readers import HEAD_SWITCHES, READERS, value_of

# Keys of a teacher's own config that have an effect: its architecture, its number of detections,
# and its class names
OF_TEACHER = (
    *("MODEL.*", "INPUT.FORMAT", "TEST.DETECTIONS_PER_IMAGE"),
    *("DATASETS.TRAIN", "DATASETS.TEST", "DATASETS.COCO_FORMAT"),
)
# Of DISTILL.TEACHER, keys for a detector and not for a BACKBONE
OF_DETECTING_TEACHER = (
    *("OPTS", "CLASSES", "ALIASES", "FOR_CLASSES"),
    *("ALLOW_OTHER_CLASSES", "EVAL_IMAGES", "MIN_AP"),
)
INSTEAD = {
    "MODEL.WEIGHTS": "DISTILL.TEACHER.WEIGHTS names its weights",
    "MODEL.DEVICE": "it runs on the student's device",
}


def refuse_unread(cfg: CfgNode, opts: Sequence[Any], source: str) -> None:
    """
    Refuse overrides without effect. They are allowed in a YAML, which may be the base of configs
    that use them; on a command line they are a mistake.

    Args:
        cfg: the config after the overrides
        opts: key, value, key, value, ...
        source: where the overrides come from, for the error

    Raises:
        ValueError: naming each key without effect, and when it would be read
    """
    found = {str(key): why_unread(str(key), cfg) for key in opts[0::2]}
    lines = [f"  {key} (read only {who})" for key, who in found.items() if who]
    if lines:
        raise ValueError(f"{source} has keys that would have no effect:\n" + "\n".join(lines))


def refuse_unread_by_teacher(cfg: CfgNode, opts: Sequence[Any]) -> None:
    """
    :func:`refuse_unread` for DISTILL.TEACHER.OPTS, where only keys that define the detector have
    an effect.
    """
    for key in map(str, opts[0::2]):
        if not any(fnmatchcase(key, pattern) for pattern in OF_TEACHER) or key in INSTEAD:
            raise ValueError(
                f"DISTILL.TEACHER.OPTS has {key}, which would have no effect on a teacher: "
                f"{INSTEAD.get(key, 'its own config neither trains nor feeds it')}. Keys with an "
                f"effect are {', '.join(OF_TEACHER)}."
            )
    refuse_unread(cfg, opts, "DISTILL.TEACHER.OPTS")


def unread_keys(cfg: CfgNode) -> List[str]:
    """Keys with a non-default value that has no effect."""
    defaults = dict(leaves(load_config()))
    changed = [k for k, v in leaves(cfg) if k in defaults and v != defaults[k]]
    student = student_config(cfg)
    return [key for key in changed if _why_unread(key, cfg, student)]


def why_unread(key: str, cfg: CfgNode) -> str:
    """
    What would read a key that is not read; "" if it is. Without distillation all keys of DISTILL
    count as read, so that a student alone can be trained with the same overrides.
    """
    return _why_unread(key, cfg, student_config(cfg))


def _why_unread(key: str, cfg: CfgNode, student: CfgNode) -> str:
    if key.startswith("DISTILL."):
        return _why_unread_in_distillation(key, cfg) if distils(cfg) else ""
    readers = (x for x in READERS if any(fnmatchcase(key, pattern) for pattern in x.patterns))
    return next((x.who for x in readers if not x.reads(student)), "")


def _why_unread_in_distillation(key: str, cfg: CfgNode) -> str:
    node, owner, heads = cfg.DISTILL, key.split(".")[1], _heads(cfg)
    several = node.STAGES or node.TEACHERS
    if owner in head_names():
        if owner not in heads:
            return f"where {owner!r} is in DISTILL.HEADS, which is {heads}"
        return _why_unread_in_head(key, cfg)
    if owner == "REGIONS" and not any(_may_require(x, {"regions"}) for x in heads):
        return f"by heads that use regions; DISTILL.HEADS is {heads}"
    if owner == "UNLABELLED" and key != "DISTILL.UNLABELLED.SETS" and not node.UNLABELLED.SETS:
        return "with DISTILL.UNLABELLED.SETS"
    if key == "DISTILL.UNLABELLED.BOX_SCORE" and not any(_may_require(x, OF_BOXES) for x in heads):
        return f"by heads that need boxes; DISTILL.HEADS is {heads}"
    if key == "DISTILL.STAGE_LR" and not node.STAGES:
        return "with DISTILL.STAGES"
    if key == "DISTILL.TEACHER.BACKBONE_STRIDES" and not (node.TEACHER.BACKBONE or several):
        return "with DISTILL.TEACHER.BACKBONE"
    of_detecting = key in [f"DISTILL.TEACHER.{x}" for x in OF_DETECTING_TEACHER]
    if of_detecting and node.TEACHER.BACKBONE and not several:
        return f"by a teacher that detects, not by DISTILL.TEACHER.BACKBONE {node.TEACHER.BACKBONE}"
    if key == "DISTILL.TEACHER.MIN_AP" and not node.TEACHER.EVAL_IMAGES:
        return "with DISTILL.TEACHER.EVAL_IMAGES above 0"
    if owner == "LIVENESS" and key != "DISTILL.LIVENESS.ENABLED" and not node.LIVENESS.ENABLED:
        return "with DISTILL.LIVENESS.ENABLED"
    return ""


def _why_unread_in_head(key: str, cfg: CfgNode) -> str:
    for ends, name, values in HEAD_SWITCHES:
        neighbour = f"{key.rpartition('.')[0]}.{name}"
        if key.endswith(ends) and value_of(cfg, neighbour) not in values:
            return f"with {neighbour} {' or '.join(values)}"
    return ""


def _heads(cfg: CfgNode) -> List[str]:
    """Names of the heads of the run, of its stages and of its teachers."""
    entries = (*cfg.DISTILL.STAGES, *cfg.DISTILL.TEACHERS)
    nodes = [cfg.DISTILL, *(x for x in entries if isinstance(x, dict))]
    named = [x["HEADS"] for x in nodes if isinstance(x.get("HEADS"), (list, tuple))]
    return list(dict.fromkeys(name for names in named for name in names if isinstance(name, str)))


def _may_require(name: str, quantities: AbstractSet[str]) -> bool:
    """Whether a head may read one of them."""
    if name not in head_names():  # another check reports it
        return True
    requires = getattr(head_class(name), "requires", ())
    return callable(requires) or not quantities.isdisjoint(requires)
