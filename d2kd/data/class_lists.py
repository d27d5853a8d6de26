"""Check that a data set's classes match the model and the other data sets."""

import logging
from functools import reduce
from typing import Optional, Sequence

from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

# Meta-architecture -> the key that holds its number of classes. Others are not checked.
NUM_CLASSES_KEYS = {
    "FCOS": "MODEL.FCOS.NUM_CLASSES",
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RepPoints": "MODEL.REPPOINTS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}
MAX_SHOWN = 20


def num_classes(cfg: CfgNode, meta_architecture: str) -> Optional[int]:
    """The model's number of classes; None if its config key is not known."""
    key = NUM_CLASSES_KEYS.get(meta_architecture)
    try:
        return reduce(getattr, key.split("."), cfg) if key else None
    except AttributeError:  # such as MODEL.FCOS in a config without its keys
        return None


def check_num_classes(
    cfg: CfgNode, meta_architecture: str, name: str, classes: Sequence[str], is_test: bool
) -> None:
    """
    Check a set's number of classes against the model's, where the key of the latter is known.

    Args:
        is_test: a test set, without a training set that defines what the model has learnt
    """
    value = num_classes(cfg, meta_architecture)
    if value is None or value == len(classes):
        return
    key = NUM_CLASSES_KEYS[meta_architecture]
    advice = f"Set {key} to {len(classes)} or use another data set."
    if is_test:
        advice = (
            f"A detector trained with {value} classes needs a test set that lists all of them in "
            f'"categories", even those without annotations. If it was trained with {len(classes)}, '
            f"set {key} to {len(classes)}."
        )
    raise ValueError(
        f"{key} is {value}, but data set {name} has {len(classes)} classes ({_shown(classes)}). "
        f"{advice}"
    )


def check_class_names(name: str, classes: Sequence[str], first: str, known: Sequence[str]) -> None:
    """
    Raises:
        ValueError: the classes differ from those of the first set, which define the model's:
            class i would be learnt, or scored, as another class
    """
    if list(classes) == list(known):
        return
    if [x.strip().casefold() for x in classes] == [x.strip().casefold() for x in known]:
        logger.warning(
            f"{name} spells its classes differently from {first}: {_shown(classes)}; "
            f"{_shown(known)}."
        )
        return
    raise ValueError(
        f"Data set {name} has {len(classes)} classes ({_shown(classes)}), but {first}, which "
        f"defines the detector's classes, has {len(known)} ({_shown(known)}). Classes are matched "
        f"by their order, so they would be confused. {_advice(classes, known)}"
    )


def _advice(classes: Sequence[str], known: Sequence[str]) -> str:
    missing = [x for x in known if x not in classes]
    extra = [x for x in classes if x not in known]
    if not missing and not extra:
        return 'Change the ids in its "categories" so that the order is the same.'
    if missing and extra:
        return (
            f"If {_shown(extra)} here is {_shown(missing)} there, use one name in both; add the "
            "classes that are missing here with the ids that they have there."
        )
    if missing:
        return (
            f'Add {_shown(missing)} to its "categories", with the ids that they have there: '
            "classes without annotations are allowed."
        )
    return (
        f'Remove {_shown(extra)} from its "categories" and "annotations", or add them to all '
        "training sets."
    )


def _shown(classes: Sequence[str]) -> str:
    return ", ".join(classes[:MAX_SHOWN]) + (", ..." if len(classes) > MAX_SHOWN else "")
