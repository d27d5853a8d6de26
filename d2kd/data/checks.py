import json
import logging
import math
import os
from functools import lru_cache, reduce
from typing import Any, Dict, List, Tuple

from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.utils.file_io import PathManager

from ..weights_file import read_arrays

logger = logging.getLogger(__name__)

# Meta-architecture -> the key that holds its number of classes. Others are not checked.
NUM_CLASSES_KEYS = {
    "FCOS": "MODEL.FCOS.NUM_CLASSES",
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}


def check_files(metadata: Metadata, key: str) -> None:
    """
    Args:
        metadata: of a registered set; one without `json_file` or `image_root` is not checked there
        key: the config key to blame
    """
    for field, what in (("json_file", "annotation file"), ("image_root", "image folder")):
        path = metadata.get(field)
        if path and not PathManager.exists(path):
            raise FileNotFoundError(
                f"{key}: the {what} of {metadata.name} is missing: {os.path.abspath(path)}. "
                "The paths of Detectron2's own sets start at $DETECTRON2_DATASETS or ./datasets."
            )


def check_json(json_file: str, image_root: str, key: str) -> List[str]:
    """
    Check that a file is COCO's format as far as training needs it, and that some images exist.

    Returns:
        the class names in the order of their ids, which is Detectron2's class order
    """
    file_names, classes = read_summary(json_file, key)
    for file_name in file_names:
        image = os.path.join(image_root, file_name)
        if not PathManager.exists(image):
            raise FileNotFoundError(
                f"{key}: {json_file} names the image {file_name}, missing at "
                f"{os.path.abspath(image)}"
            )
    return list(classes)


def read_summary(json_file: str, key: str) -> Tuple[Tuple[str, ...], Tuple[str, ...]]:
    """
    Returns:
        the names of a few images, and the class names in the order of their ids

    Raises:
        ValueError: not COCO's format as far as training needs it; `key` is blamed
    """
    path = PathManager.get_local_path(json_file)
    try:
        return _summary(path, os.path.getmtime(path))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{key}: {path} is not in COCO's format: {error}") from error


def check_proposals(cfg: CfgNode, part: str) -> None:
    """
    Read the files of MODEL.LOAD_PROPOSALS safely, before Detectron2 unpickles them and runs what is
    in them.

    Args:
        part: "TRAIN" or "TEST"
    """
    key = f"PROPOSAL_FILES_{part}"
    for path in cfg.DATASETS[key] if cfg.MODEL.LOAD_PROPOSALS else ():
        try:
            with PathManager.open(path, "rb") as file:
                read_arrays(file)
        except FileNotFoundError:
            raise FileNotFoundError(f"DATASETS.{key}: there is no file {path!r}.") from None
        except Exception as error:  # whatever the bytes look like to the reader
            raise ValueError(f"DATASETS.{key}: {path!r} holds no proposals: {error}") from error


@lru_cache(maxsize=16)  # a large file takes seconds, and the test set is often checked again
def _summary(path: str, modified: float) -> Tuple[Tuple[str, ...], Tuple[str, ...]]:
    """Returns: the names of a few images, and the class names by id."""
    with open(path) as f:
        content = json.load(f)
    for part in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise ValueError(f'there is no list "{part}"')
    for part in ("images", "categories"):
        if not content[part]:
            raise ValueError(f'the list "{part}" is empty')
    _check_keys(content["images"], "images", ("id", "file_name", "width", "height"))
    _check_keys(content["annotations"], "annotations", ("id", "image_id", "category_id", "bbox"))
    _check_keys(content["categories"], "categories", ("id", "name"))
    for part in ("images", "annotations", "categories"):
        _check_unique(content[part], part)
    for image in content["images"]:
        _check_inside(image["file_name"])
    for annotation in content["annotations"]:
        _check_box(annotation)
    names = {c["id"]: c["name"] for c in content["categories"]}
    used = {a["category_id"] for a in content["annotations"]}
    if not used <= set(names):
        raise ValueError(f"category_id {min(used - set(names))} is not among the categories")
    some = content["images"][:3] + content["images"][-1:]
    return tuple(i["file_name"] for i in some), tuple(names[i] for i in sorted(names))


def _check_keys(entries: List[Any], part: str, keys: Tuple[str, ...]) -> None:
    for i, entry in enumerate(entries):
        for k in keys:
            if k not in entry:
                raise ValueError(f'{part}[{i}] has no "{k}"')


def _check_unique(entries: List[Any], part: str) -> None:
    seen = set()
    for entry in entries:
        if entry["id"] in seen:
            raise ValueError(f"{part} has the id {entry['id']!r} twice")
        seen.add(entry["id"])


def _check_inside(file_name: str) -> None:
    """A file from elsewhere may name any path; what is read stays in the image folder."""
    if os.path.isabs(file_name) or os.path.normpath(file_name).split(os.sep)[0] == os.pardir:
        raise ValueError(f"the file_name {file_name!r} leads out of the image folder")


def _check_box(annotation: Dict[str, Any]) -> None:
    box = annotation["bbox"]
    if len(box) != 4 or not all(math.isfinite(x) for x in box) or min(box[2:]) < 0:
        raise ValueError(
            f"annotation {annotation['id']!r} has the bbox {box}; it must be [x, y, width, height] "
            "in pixels"
        )


def check_num_classes(cfg: CfgNode, meta_architecture: str, name: str, classes: List[str]) -> None:
    """Check a set's classes against the model's key, where the architecture has a known one."""
    key = NUM_CLASSES_KEYS.get(meta_architecture)
    try:
        value = reduce(getattr, key.split("."), cfg) if key else None
    except AttributeError:  # such as MODEL.FCOS where no config function has added it
        return
    if value is not None and value != len(classes):
        shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        raise ValueError(
            f"{key} is {value}, but data set {name} has {len(classes)} classes ({shown}). "
            f"Set {key} to {len(classes)} or use another data set."
        )


def check_class_names(name: str, classes: List[str], first: str, known: List[str]) -> None:
    """
    Warn where a set's classes are others than those of the first set, which the model learns: its
    class i would be scored as another class.
    """
    if list(classes) != list(known):
        logger.warning(f"{name} has the classes {list(classes)}, but {first} has {list(known)}")
