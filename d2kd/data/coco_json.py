"""One pass over a JSON of COCO's format: everything that training and evaluation will ask of it."""

import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from detectron2.utils.file_io import PathManager

from .annotations import KEYS, AnnotationFacts, check_annotations

PARTS = ("images", "annotations", "categories")
MAX_ID = 2**63  # NumPy's integers, in which pycocotools sorts ids, end there


class ImageEntry(NamedTuple):
    """An entry of "images"; sizes in pixels."""

    file_name: str
    width: int
    height: int


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
    classes = _classes(content["categories"])
    if missing:
        return CocoSummary(classes, 'there is no list "annotations"', has_annotations=False)
    try:
        # Of the sets that Detectron2 ships, it knows that these have some ids twice.
        return CocoSummary(classes, "", True, _images(content), _facts(content, "minival" in path))
    except (ValueError, ArithmeticError) as error:  # such as of a number of 400 digits
        return CocoSummary(classes, problem=str(error))


def _images(content: Dict[str, Any]) -> Tuple[ImageEntry, ...]:
    entries = content["images"]
    _check_entries(entries, "images", ("id", "file_name", "width", "height"))
    for entry in entries:
        name = f"image {entry['id']}"
        if not isinstance(entry["file_name"], str) or not entry["file_name"]:
            raise ValueError(f"{name} has the file_name {entry['file_name']!r}; it must be text")
        for side in ("width", "height"):
            if type(entry[side]) is not int or entry[side] < 1:
                raise ValueError(
                    f"{name} has the {side} {entry[side]!r}; it must be a whole number of pixels, "
                    "1 or more"
                )
        _check_inside(entry["file_name"])
    return tuple(ImageEntry(x["file_name"], x["width"], x["height"]) for x in entries)


def _facts(content: Dict[str, Any], twice: bool) -> AnnotationFacts:
    annotations, images = content["annotations"], content["images"]
    _check_entries(annotations, "annotations", KEYS, twice)
    notes = _check_names_differ(content["categories"])
    sizes = {x["id"]: (x["width"], x["height"]) for x in images}
    facts = check_annotations(annotations, sizes, {x["id"] for x in content["categories"]})
    facts.notes += notes
    _check_same_file(images, annotations)
    return facts


def _check_entries(entries: List[Any], part: str, keys: Sequence[str], twice: bool = False) -> None:
    """Each is a mapping with these keys, and an id of its own unless it may be there `twice`."""
    seen = set()
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{part}[{i}] is {entry!r}; it must have the keys {', '.join(keys)}")
        for k in keys:
            if k not in entry:
                raise ValueError(f'{part}[{i}] has no "{k}"')
        number = entry["id"]
        if type(number) is not int or not -MAX_ID <= number < MAX_ID:
            raise ValueError(f"{part}[{i}] has the id {number!r}; it must be a whole number")
        if number in seen and not twice:
            raise ValueError(f"{part} has the id {number!r} twice")
        seen.add(number)


def _classes(categories: List[Any]) -> Tuple[str, ...]:
    _check_entries(categories, "categories", ("id", "name"))
    for category in categories:
        name = category["name"]
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"category {category['id']} has the name {name!r}; it must be text")
    return tuple(x["name"] for x in sorted(categories, key=lambda x: x["id"]))


def _check_names_differ(categories: List[Dict[str, Any]]) -> List[str]:
    """Returns: which names can be taken for one another."""
    ids: Dict[str, int] = {}
    spellings: Dict[str, str] = {}
    notes = []
    for category in categories:
        number, name = category["id"], category["name"]
        if name in ids:
            raise ValueError(
                f"the categories {ids[name]} and {number} have one name, {name!r}: classes are "
                "told apart by their names. Give each its own, or join them under one id"
            )
        ids[name] = number
        other = spellings.setdefault(name.strip().casefold(), name)
        if other != name:
            notes.append(
                f"the categories {ids[other]} and {number}, {other!r} and {name!r}, differ in "
                "spelling alone and are two classes"
            )
    return notes


def _check_inside(file_name: str) -> None:
    """A file from elsewhere may name any path; what is read stays in the image folder."""
    if os.path.isabs(file_name) or os.path.normpath(file_name).split(os.sep)[0] == os.pardir:
        raise ValueError(f"the file_name {file_name!r} leads out of the image folder")


def _check_same_file(images: List[Dict[str, Any]], annotations: List[Dict[str, Any]]) -> None:
    """Of a file under two ids, each would be read with a part of the objects in it."""
    by_file = defaultdict(list)
    for entry in images:
        by_file[os.path.normpath(entry["file_name"])].append(entry["id"])
    repeated = {k: v for k, v in by_file.items() if len(v) > 1}
    objects: Dict[int, List[Any]] = {x: [] for ids in repeated.values() for x in ids}
    for annotation in annotations if objects else ():
        if annotation["image_id"] in objects:
            found = [annotation["category_id"], *annotation["bbox"]]
            objects[annotation["image_id"]].append(found)
    for file_name, ids in repeated.items():
        if any(sorted(objects[x]) != sorted(objects[ids[0]]) for x in ids):
            raise ValueError(
                f"the images {' and '.join(map(str, ids[:2]))} are one file, {file_name}, with "
                "other annotations each: give the file one id, and all its annotations that"
            )
