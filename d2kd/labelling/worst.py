"""The images of the labelled set on which teacher and labels disagree most."""

from typing import Any, Dict, List, Mapping, NamedTuple, Sequence

from .inference import Annotation
from .thresholds import Gate


class ImageErrors(NamedTuple):
    """COCO annotations of one image; `truth` includes those missed, false alarms have a score."""

    image_id: int
    truth: List[Annotation]
    misses: List[Annotation]
    false_alarms: List[Annotation]

    @property
    def count(self) -> int:
        return len(self.misses) + len(self.false_alarms)


def worst_images(gates: Sequence[Gate], most: int) -> List[ImageErrors]:
    """
    Args:
        gates: those without a threshold do not count
        most: number of images

    Returns:
        images with a miss or a false alarm, those with most of them first
    """
    images: Dict[int, ImageErrors] = {}
    for gate in (x for x in gates if x.threshold is not None):
        for kind, annotations in (
            ("truth", gate.matches.truth),
            ("misses", gate.misses),
            ("false_alarms", gate.false_alarms),
        ):
            for annotation in annotations:
                number = annotation["image_id"]
                errors = images.setdefault(number, ImageErrors(number, [], [], []))
                getattr(errors, kind).append(annotation)
    wrong = [x for x in images.values() if x.count]
    return sorted(wrong, key=lambda x: (-x.count, x.image_id))[:most]


def list_worst(
    worst: Sequence[ImageErrors], files: Mapping[int, str], names: Mapping[int, str]
) -> List[Dict[str, Any]]:
    """
    Args:
        files: path of each image, by id
        names: of the classes, by category id

    Returns:
        for a JSON
    """

    def entry(annotation: Annotation) -> Dict[str, Any]:
        score = {"score": annotation["score"]} if "score" in annotation else {}
        return {"class": names[annotation["category_id"]], "bbox": annotation["bbox"], **score}

    return [
        {
            "file_name": files[x.image_id],
            "image_id": x.image_id,
            "misses": [entry(a) for a in x.misses],
            "false_alarms": [entry(a) for a in x.false_alarms],
        }
        for x in worst
    ]
