"""Are the classes of a data set those of the model, and of the other sets?"""

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
    """What the model's key says; None where the architecture has no known one."""
    key = NUM_CLASSES_KEYS.get(meta_architecture)
    try:
        return reduce(getattr, key.split("."), cfg) if key else None
    except AttributeError:  # such as MODEL.FCOS where no config function has added it
        return None


def check_num_classes(
    cfg: CfgNode, meta_architecture: str, name: str, classes: Sequence[str], is_test: bool = False
) -> None:
    """
    Check a set's classes against the model's key, where the architecture has a known one.

    Args:
        is_test: a test set, where no training set tells what the model has learnt
    """
    value = num_classes(cfg, meta_architecture)
    if value is None or value == len(classes):
        return
    key = NUM_CLASSES_KEYS[meta_architecture]
    advice = f"Set {key} to {len(classes)} or use another data set."
    if is_test:
        advice = (
            f"A detector that was trained with {value} needs a test set that lists all of them in "
            f'"categories", also those without annotations; one of {len(classes)}, {key} '
            f"{len(classes)}."
        )
    raise ValueError(
        f"{key} is {value}, but data set {name} has {len(classes)} classes ({_shown(classes)}). "
        f"{advice}"
    )


def check_class_names(name: str, classes: Sequence[str], first: str, known: Sequence[str]) -> None:
    """
    Raises:
        ValueError: a set's classes are others than those of the first set, which the model learns:
            its class i would be learnt, or scored, as another class
    """
    if list(classes) == list(known):
        return
    if [x.strip().casefold() for x in classes] == [x.strip().casefold() for x in known]:
        logger.warning(
            f"{name} writes its classes otherwise than {first}: {_shown(classes)}; {_shown(known)}."
        )
        return
    raise ValueError(
        f"Data set {name} has {len(classes)} classes ({_shown(classes)}), but {first}, which tells "
        f"what the detector learns, has {len(known)} ({_shown(known)}). Detection i counts as the "
        f"i-th class by id, so these would be taken for one another. {_advice(classes, known)}"
    )


def _advice(classes: Sequence[str], known: Sequence[str]) -> str:
    missing = [x for x in known if x not in classes]
    extra = [x for x in classes if x not in known]
    if not missing and not extra:
        return 'The ids in its "categories" must give them the same order.'
    if missing and extra:
        return (
            f"If {_shown(extra)} here is {_shown(missing)} there, give it one name in both; list "
            "what is missing here with the id that it has there."
        )
    if missing:
        return (
            f'List {_shown(missing)} in its "categories" too, with the ids that they have there: '
            "classes without annotations are fine."
        )
    return (
        f'Take {_shown(extra)} out of its "categories" and "annotations", or list them in all '
        "training sets."
    )


def _shown(classes: Sequence[str]) -> str:
    return ", ".join(classes[:MAX_SHOWN]) + (", ..." if len(classes) > MAX_SHOWN else "")
