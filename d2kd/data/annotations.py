"""Check the annotations of a COCO-format JSON for training and evaluation."""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Set, Tuple

import numpy as np

from .box_units import Boxes, check_pixels
from .coco_parts import is_whole
from .rle import is_rle

KEYS = ("id", "image_id", "category_id", "bbox")
NUMBERS = (int, float)
LARGEST = 1e9  # limit for the values of a box, far beyond any image size
MANY_CROWDS = 0.1  # share of all annotations; in COCO it is 0.01


@dataclass
class AnnotationFacts:
    """Facts about all annotations of a set; each mask problem holds the id of its first case."""

    count: int = 0
    objects: int = 0  # without crowds
    classes: Set[str] = field(default_factory=set)  # of the objects
    notes: List[str] = field(default_factory=list)
    no_mask: Optional[int] = None  # crowd or not
    object_without_mask: Optional[int] = None
    object_with_rle: Optional[int] = None
    object_with_polygon: Optional[int] = None
    other_size: Optional[int] = None  # an RLE whose size is not its image's
    broken: List[int] = field(default_factory=list)  # no polygon has three points or more
    odd_area: List[int] = field(default_factory=list)
    keypoints: Dict[int, int] = field(default_factory=dict)  # length of the list -> first id


def check_annotations(
    annotations: List[Dict[str, Any]],
    sizes: Mapping[int, Tuple[int, int]],
    categories: Mapping[int, str],
) -> AnnotationFacts:
    """
    Args:
        annotations: with KEYS and unique ids
        sizes: width and height of each image, by id
        categories: names, by id

    Raises:
        ValueError: the first invalid annotation, named by its id
    """
    facts = AnnotationFacts(len(annotations))
    for annotation in annotations:
        _check_references(annotation, sizes, categories)
        _check_box(annotation)
        _check_flags(annotation)
        _check_mask(annotation, sizes[annotation["image_id"]], facts)
        if not annotation.get("iscrowd", 0):
            facts.objects += 1
            facts.classes.add(categories[annotation["category_id"]])
        facts.keypoints.setdefault(len(annotation.get("keypoints") or ()), annotation["id"])
        if _odd_area(annotation):
            facts.odd_area.append(annotation["id"])
    if annotations:
        facts.notes = check_pixels(_boxes(annotations, sizes))
        facts.notes += [*_many_crowds(facts), *_repeated(annotations)]
    return facts


def _boxes(annotations: List[Dict[str, Any]], sizes: Mapping[int, Tuple[int, int]]) -> Boxes:
    values = np.array([x["bbox"] for x in annotations], dtype=np.float64)
    size = np.array([sizes[x["image_id"]] for x in annotations], dtype=np.float64)
    return Boxes([x["id"] for x in annotations], values[:, :2], values[:, 2:], size)


def _many_crowds(facts: AnnotationFacts) -> List[str]:
    """A note where iscrowd seems to be written for something else than crowds."""
    crowds = facts.count - facts.objects
    if crowds <= MANY_CROWDS * facts.count:
        return []
    return [
        f"{crowds} of {facts.count} annotations have iscrowd 1: neither training nor evaluation "
        "takes them for objects. CVAT writes it for each mask that is no polygon; where one is one "
        "object, set it to 0"
    ]


def _repeated(annotations: List[Dict[str, Any]]) -> List[str]:
    """A note about objects that are there twice, as where merged exports overlap."""
    objects = [x for x in annotations if not x.get("iscrowd", 0)]
    # Hashes, as a large set's boxes would take gigabytes as tuples.
    hashes = [hash((x["image_id"], x["category_id"], *x["bbox"])) for x in objects]
    values, first = np.unique(np.array(hashes, dtype=np.int64), return_index=True)
    if len(first) == len(objects):
        return []
    again = int(np.setdiff1d(np.arange(len(objects)), first)[0])
    earlier = int(first[np.searchsorted(values, hashes[again])])
    return [
        f"{len(objects) - len(first)} of {len(annotations)} annotations have the image, class and "
        f"box of another one, such as {objects[again]['id']} those of {objects[earlier]['id']}: "
        "evaluation counts both as objects, and at most one of them as found"
    ]


def _check_references(
    annotation: Dict[str, Any], sizes: Mapping[int, Any], categories: Mapping[int, Any]
) -> None:
    for key, known, part in (
        ("image_id", sizes, "images"),
        ("category_id", categories, "categories"),
    ):
        value = annotation[key]
        if not is_whole(value) or value not in known:
            raise ValueError(
                f"annotation {annotation['id']} has the {key} {value!r}, but {key} {value!r} is "
                f"not among the {part}"
            )


def _check_box(annotation: Dict[str, Any]) -> None:
    box = annotation["bbox"]
    if not (
        isinstance(box, list)
        and len(box) == 4
        and all(type(x) in NUMBERS and -LARGEST < x < LARGEST for x in box)
        and min(box[2:]) >= 0
    ):
        raise ValueError(
            f"annotation {annotation['id']!r} has the bbox {box}; it must be [x, y, width, height] "
            "in pixels"
        )


def _check_flags(annotation: Dict[str, Any]) -> None:
    name = f"annotation {annotation['id']}"
    crowd, ignore = annotation.get("iscrowd", 0), annotation.get("ignore", 0)
    if type(crowd) not in (int, bool) or crowd not in (0, 1):
        raise ValueError(f"{name} has the iscrowd {crowd!r}; it must be 0 or 1, or be left out")
    if ignore != 0:
        raise ValueError(
            f"{name} has the ignore {ignore!r}, which Detectron2 does not support: use iscrowd 1 "
            "for objects that evaluation should ignore"
        )
    area = annotation.get("area")
    if area is not None and not (type(area) in NUMBERS and 0 <= area < math.inf):
        raise ValueError(
            f"{name} has the area {area!r}; it must be a number of square pixels, or be left out"
        )
    if annotation.get("keypoints") and not _are_numbers(annotation["keypoints"]):
        raise ValueError(f"{name} has keypoints that are not a list of numbers")


def _odd_area(annotation: Dict[str, Any]) -> bool:
    """Whether the area is impossible for an object in this box."""
    area, (width, height) = annotation.get("area"), annotation["bbox"][2:]
    if area is None or not width * height:
        return False
    return not 0 < area <= 1.1 * (width + 1) * (height + 1)


def _check_mask(annotation: Dict[str, Any], size: Tuple[int, int], facts: AnnotationFacts) -> None:
    """Record what a detector with masks cannot use; raise on what no detector can read."""
    mask, name = annotation.get("segmentation"), annotation["id"]
    is_object = not annotation.get("iscrowd", 0)
    if not mask:
        facts.no_mask = name if facts.no_mask is None else facts.no_mask
        if is_object and facts.object_without_mask is None:
            facts.object_without_mask = name
    elif isinstance(mask, dict):
        if not is_rle(mask):
            raise ValueError(
                f'annotation {name} has an RLE whose "counts" do not fill its "size", [height, '
                "width]"
            )
        if is_object and facts.object_with_rle is None:
            facts.object_with_rle = name
        if facts.other_size is None and tuple(mask["size"]) != size[::-1]:
            facts.other_size = name
    elif not isinstance(mask, list) or not all(map(_are_numbers, mask)):
        raise ValueError(
            f"annotation {name} has a segmentation that is neither an RLE nor a list of polygons, "
            "each a list of numbers [x0, y0, x1, y1, ...]"
        )
    elif not any(map(is_polygon, mask)):
        facts.broken.append(name)
    elif is_object and facts.object_with_polygon is None:
        facts.object_with_polygon = name


def is_polygon(values: List[float]) -> bool:
    """Whether Detectron2 keeps this polygon in training: it needs at least three points."""
    return len(values) % 2 == 0 and len(values) >= 6


def _are_numbers(values: Any) -> bool:
    try:
        return isinstance(values, list) and math.isfinite(sum(values))
    except TypeError:
        return False
