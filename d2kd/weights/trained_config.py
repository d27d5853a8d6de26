"""Compare the config that a checkpoint was trained with and the one that it is used with."""

from fnmatch import fnmatchcase
from typing import Any, List, Mapping, Tuple

import yaml

from detectron2.config import CfgNode

from ..config import leaves, student_config

# In C, where PyYAML has it: a tenth of the time.
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

OF_YAML = "INPUT.FORMAT: "  # begins what identifies a teacher that a YAML describes

Change = Tuple[str, Any, Any]  # key, the checkpoint's value, this run's

# Keys that change what a detector's weights mean, but not their shapes
MEANING = (
    "INPUT.FORMAT",
    "MODEL.PIXEL_*",
    "MODEL.ANCHOR_GENERATOR.*",
    "*.BBOX_REG_WEIGHTS",
    "*.USE_SIGMOID_CE",
)


def changed_keys(theirs: str, ours: str) -> List[Change]:
    """
    Keys whose values differ between two configs, each as yacs dumps it. Keys of one side alone come
    from another version of d2kd, which is reported elsewhere.
    """
    old, new = (dict(leaves(yaml.load(text, Loader))) for text in (theirs, ours))
    return [(k, old[k], new[k]) for k in new if k in old and old[k] != new[k]]


def check_same_detector(found: Mapping[str, Any], cfg: CfgNode, source: str) -> None:
    """
    Args:
        found: what is in a checkpoint beside the weights; one without a config is not compared
        cfg: of the detector that they were loaded into
        source: of the checkpoint, for the error

    Raises:
        ValueError: a key has another value, with which the weights fit and mean something else
    """
    from ..config.unread import why_unread  # which knows the heads, which load weights

    saved = found.get("trainer", {}).get("config")
    changed = changed_keys(saved, student_config(cfg).dump()) if saved else []
    lines = [
        f"  {key}: {old!r}, now {new!r}"
        for key, old, new in changed
        if any(fnmatchcase(key, pattern) for pattern in MEANING) and not why_unread(key, cfg)
    ]
    if lines:
        raise ValueError(
            f"{source}: the detector was trained with other values, and would detect something "
            "else with these:\n" + "\n".join(lines) + "\nTake the config that it was trained with."
        )
