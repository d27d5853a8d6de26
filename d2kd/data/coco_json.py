"""Read a COCO-format JSON once: everything that training and evaluation need from it."""

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
    Content of a JSON. `classes`: names ordered by id, which is Detectron2's class order;
    `problem`: why no detector can be trained or evaluated on it, or "". The other fields are set
    only if there is no problem.
    """

    classes: Tuple[str, ...]
    problem: str = ""
    has_annotations: bool = True
    images: Tuple[ImageEntry, ...] = ()
    facts: AnnotationFacts = field(default_factory=AnnotationFacts)


def read_summary(json_file: str, key: str) -> CocoSummary:
    """
    Raises:
        ValueError: not COCO's format as far as training and evaluation need it, naming `key`
    """
    summary = look_at(json_file, key)
    if summary.problem:
        raise ValueError(_not_coco(json_file, key, summary.problem))
    return summary


def read_classes(json_file: str, key: str) -> Tuple[str, ...]:
    """
    Returns:
        the class names ordered by id, even if the rest of the file is invalid

    Raises:
        ValueError: not a file in COCO's format, naming `key`
    """
    summary = look_at(json_file, key)
    return summary.classes if summary.has_annotations else read_summary(json_file, key).classes


def look_at(json_file: str, key: str) -> CocoSummary:
    """
    Summarise a JSON; a problem in its content is part of the summary.

    Raises:
        ValueError: the file does not have the lists of COCO's format, naming `key`
    """
    path = PathManager.get_local_path(json_file)
    try:
        return _summarise(path, os.path.getmtime(path))
    except OSError as error:  # a folder, or a file that nobody may read
        raise type(error)(f"{key}: {json_file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(_not_coco(json_file, key, str(error))) from error


def _not_coco(json_file: str, key: str, why: str) -> str:
    return f"{key}: {PathManager.get_local_path(json_file)} is not in COCO's format: {why}"


@lru_cache(maxsize=16)  # a large file takes seconds, and test sets are checked repeatedly
def _summarise(path: str, modified: float) -> CocoSummary:
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
        # The minival sets of Detectron2 have duplicate ids, which Detectron2 allows.
        return CocoSummary(
            classes, "", True, read_images(content["images"]), _facts(content, "minival" in path)
        )
    except (ValueError, ArithmeticError) as error:  # such as from a number of 400 digits
        return CocoSummary(classes, problem=str(error))


def _facts(content: Dict[str, Any], twice: bool) -> AnnotationFacts:
    annotations, images = content["annotations"], content["images"]
    check_entries(annotations, "annotations", KEYS, twice)
    notes = check_names_differ(content["categories"])
    sizes = {x["id"]: (x["width"], x["height"]) for x in images}
    facts = check_annotations(
        annotations, sizes, {x["id"]: x["name"] for x in content["categories"]}
    )
    facts.notes += notes
    check_same_file(images, annotations)
    return facts
