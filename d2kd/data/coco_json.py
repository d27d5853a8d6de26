"""One pass over a JSON of COCO's format: everything that training and evaluation will ask of it."""

import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Dict, Tuple

from detectron2.utils.file_io import PathManager

from .annotations import KEYS, AnnotationFacts, check_annotations
from .coco_parts import (
    ImageEntry,
    check_entries,
    check_names_differ,
    check_same_file,
    names_by_id,
    read_images,
)

PARTS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class CocoSummary:
    """
    What a JSON tells. `classes`: names in the order of their ids, which is Detectron2's class
    order; `problem`: why no detector can be trained or evaluated on it, "" if one can; all else is
    only told where there is none.
    """

    classes: Tuple[str, ...]
    problem: str = ""
    has_annotations: bool = True
    images: Tuple[ImageEntry, ...] = ()
    facts: AnnotationFacts = field(default_factory=AnnotationFacts)


def read_summary(json_file: str, key: str) -> CocoSummary:
    """
    Raises:
        ValueError: not COCO's format as far as training and evaluation need it; `key` is blamed
    """
    summary = look_at(json_file, key)
    if summary.problem:
        raise ValueError(_not_coco(json_file, key, summary.problem))
    return summary


def read_classes(json_file: str, key: str) -> Tuple[str, ...]:
    """
    Returns:
        the class names in the order of their ids, also where only the rest of the file is odd

    Raises:
        ValueError: no file in COCO's format; `key` is blamed
    """
    summary = look_at(json_file, key)
    return summary.classes if summary.has_annotations else read_summary(json_file, key).classes


def look_at(json_file: str, key: str) -> CocoSummary:
    """
    Raises:
        ValueError: a file that is not even made of images, annotations and categories
    """
    path = PathManager.get_local_path(json_file)
    try:
        return _look_at(path, os.path.getmtime(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(_not_coco(json_file, key, str(error))) from error


def _not_coco(json_file: str, key: str, why: str) -> str:
    return f"{key}: {PathManager.get_local_path(json_file)} is not in COCO's format: {why}"


@lru_cache(maxsize=16)  # a large file takes seconds, and the test set is often checked again
def _look_at(path: str, modified: float) -> CocoSummary:
    with open(path) as f:
        content = json.load(f)
    parts = content if isinstance(content, dict) else {}
    missing = [x for x in PARTS if not isinstance(parts.get(x), list)]
    if missing and missing != ["annotations"]:
        raise ValueError(f'there is no list "{missing[0]}"')
    for part in ("images", "categories"):
        if not content[part]:
            raise ValueError(f'the list "{part}" is empty')
    classes = names_by_id(content["categories"])
    if missing:
        return CocoSummary(classes, 'there is no list "annotations"', has_annotations=False)
    try:
        # Detectron2 knows that the minival sets it ships have some ids twice.
        return CocoSummary(
            classes, "", True, read_images(content["images"]), _facts(content, "minival" in path)
        )
    except (ValueError, ArithmeticError) as error:  # such as of a number of 400 digits
        return CocoSummary(classes, problem=str(error))


def _facts(content: Dict[str, Any], twice: bool) -> AnnotationFacts:
    annotations, images = content["annotations"], content["images"]
    check_entries(annotations, "annotations", KEYS, twice)
    notes = check_names_differ(content["categories"])
    sizes = {x["id"]: (x["width"], x["height"]) for x in images}
    facts = check_annotations(annotations, sizes, {x["id"] for x in content["categories"]})
    facts.notes += notes
    check_same_file(images, annotations)
    return facts
