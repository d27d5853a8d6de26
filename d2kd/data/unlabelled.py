"""Images without labels, from which a student learns beside those of DATASETS.TRAIN."""

import json
import logging
import os
from typing import Any, Dict, List, Set, Tuple

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..utils.checks import check_range
from ..utils.distils import distils
from ..utils.packaged import find_file
from .coco_json import read_summary
from .entries import coco_format_entries
from .find_images import find_images

logger = logging.getLogger(__name__)

KEY = "DISTILL.UNLABELLED"


def add_unlabelled_config(cfg: CfgNode) -> None:
    """
    Args:
        cfg: the node DISTILL, changed in place
    """
    node = cfg.UNLABELLED = CfgNode()
    # Images without labels, for heads alone, not for the student's own losses: folders, or {IMAGES:
    # folder, JSON: file} for those that a JSON in COCO's format lists
    node.SETS = []
    # Of the SOLVER.IMS_PER_BATCH images of a batch, above 0; 1.0: no labelled image at all
    node.SHARE = 0.5
    # The teacher's detections from this score on stand in for the boxes of heads that need some;
    # 0: such heads are refused
    node.BOX_SCORE = 0.0


def batch_sizes(cfg: CfgNode) -> Tuple[int, int]:
    """
    How many labelled and unlabelled images a batch of all processes has. A student alone has the
    same labelled ones.

    Raises:
        ValueError: a share with which one of the two is no multiple of the processes
    """
    total, processes = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if "DISTILL" not in cfg:
        return total, 0
    node = cfg.DISTILL.UNLABELLED
    check_range(f"{KEY}.BOX_SCORE", node.BOX_SCORE, 0, 1)
    check_range(f"{KEY}.SHARE", node.SHARE, 0, 1)
    if not node.SETS:
        return total, 0
    unlabelled = round(node.SHARE * total)
    labelled = total - unlabelled
    if unlabelled < 1 or (not labelled and node.SHARE < 1):
        raise ValueError(
            f"{KEY}.SHARE {node.SHARE} of SOLVER.IMS_PER_BATCH {total} leaves {labelled} labelled "
            f"and {unlabelled} unlabelled images in a batch. Take a share nearer 0.5 or a larger "
            "batch; without any labelled image, 1.0."
        )
    if unlabelled % processes or labelled % processes:
        raise ValueError(
            f"{KEY}.SHARE {node.SHARE} of SOLVER.IMS_PER_BATCH {total} are {labelled} labelled and "
            f"{unlabelled} unlabelled images; both must be multiples of the {processes} processes."
        )
    if not (labelled or distils(cfg)):
        raise ValueError(
            f"{KEY}.SHARE is 1.0: no labelled image is left for a student alone "
            "(DISTILL.ENABLED False)."
        )
    return labelled, unlabelled if distils(cfg) else 0


def unlabelled_sets(cfg: CfgNode) -> List[Tuple[str, str, str]]:
    """
    Returns:
        of each of DISTILL.UNLABELLED.SETS the key, the folder, and the JSON or ""

    Raises:
        ValueError: an entry that is neither a folder nor a mapping
        FileNotFoundError: no such folder or file
    """
    found = []
    for i, entry in enumerate(cfg.DISTILL.UNLABELLED.SETS):
        key = f"{KEY}.SETS[{i}]"
        entry = {"IMAGES": entry} if isinstance(entry, str) else entry
        is_mapping = isinstance(entry, dict) and {"IMAGES"} <= set(entry) <= {"IMAGES", "JSON"}
        if not is_mapping or not all(isinstance(x, str) for x in entry.values()):
            raise ValueError(
                f"{key} must be a folder or {{IMAGES: folder, JSON: file}}: {entry!r}."
            )
        folder, json_file = entry["IMAGES"], find_file(entry.get("JSON", ""))
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{key} IMAGES: there is no folder {folder!r}.")
        if json_file and not os.path.isfile(json_file):
            raise FileNotFoundError(f"{key} JSON: there is no file {json_file!r}.")
        found.append((key, folder, json_file))
    return found


def find_unlabelled(cfg: CfgNode) -> List[Dict[str, Any]]:
    """
    The images of DISTILL.UNLABELLED.SETS, in Detectron2's format, without annotations.

    Raises:
        OSError, ValueError: as of :func:`unlabelled_sets`; images that are not there or cannot be
            read, or a JSON with labels
    """
    found: List[Dict[str, Any]] = []
    for key, folder, json_file in unlabelled_sets(cfg):
        found += find_images(folder, json_file, (f"{key} IMAGES", f"{key} JSON"))
        if json_file:
            _check_no_labels(json_file, key)
    for number, image in enumerate(found):
        image["image_id"] = number  # those of several sets may be the same
    tested = _tested(cfg)
    both = [x for x in found if tested and os.path.realpath(x["file_name"]) in tested]
    if both:
        logger.warning(
            f"{len(both)} of the {len(tested)} images of DATASETS.TEST are also in {KEY}.SETS, "
            f"such as {both[0]['file_name']}: the AP does not measure generalisation."
        )
    return found


def _tested(cfg: CfgNode) -> Set[str]:
    """Paths, without links, of the images of the test sets in DATASETS.COCO_FORMAT."""
    paths: Set[str] = set()
    for name, json_file, folder, key in coco_format_entries(cfg):
        if name in cfg.DATASETS.TEST:
            images = read_summary(json_file, key).images
            paths.update(os.path.realpath(os.path.join(folder, x.file_name)) for x in images)
    return paths


def _check_no_labels(json_file: str, key: str) -> None:
    with open(json_file) as file:
        labels = json.load(file).get("annotations")
    if labels:
        raise ValueError(
            f"{key}: {json_file} has {len(labels)} annotations, which nobody would read. Images "
            "with labels belong into DATASETS.TRAIN; to use them without, take them out of the "
            "JSON."
        )
