"""Check all data sets of a run, one by one and together."""

import logging
import os
from collections import defaultdict
from typing import Dict, List, Mapping, Optional, Sequence, Set, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

from ..utils.checks import nearest
from .checks import check_evaluator, check_files
from .class_lists import check_class_names, check_num_classes, num_classes
from .class_names import coco_json_files, names_in_sets
from .coco_json import look_at, read_summary
from .coco_parts import ImageEntry
from .image_files import check_images
from .outlines import CLASSES
from .set_checks import check_role

logger = logging.getLogger(__name__)


class SetChecks:
    """Checks a run's data sets one by one, training sets first."""

    def __init__(self, cfg: CfgNode, meta_architecture: str, owned: Mapping[str, str]):
        """
        Args:
            meta_architecture: the detector whose number of classes has to fit
            owned: name of each set that d2kd registers -> the config key to blame
        """
        self.cfg = cfg
        self.meta_architecture = meta_architecture
        self.owned = owned
        # The set that defines the model's classes, and its class names
        self.learnt: Optional[Tuple[str, Sequence[str]]] = None
        self.files: Dict[str, Set[str]] = {"TRAIN": set(), "TEST": set()}
        self.objects: Dict[str, int] = {}  # of training sets
        self.with_objects: Dict[str, Set[str]] = {"TRAIN": set(), "TEST": set()}  # classes

    def check(self, name: str, part: str, is_there: bool = True) -> None:
        """
        Args:
            part: "TRAIN" or "TEST"
            is_there: False: a set of the built-in shapes that has not been drawn yet

        Raises:
            ValueError, OSError: naming what is wrong and what would be right
        """
        classes = self._check_set(name, part) if is_there else tuple(CLASSES)
        if classes is None:
            return
        if part == "TEST" and self.learnt is None:
            self.learnt = self._learnt_elsewhere()
        if self.learnt is None:
            is_test = part == "TEST"
            check_num_classes(self.cfg, self.meta_architecture, name, classes, is_test)
            self.learnt = name, classes
        check_class_names(name, classes, *self.learnt)

    def check_together(self) -> None:
        """
        Raises:
            ValueError: the training sets have no objects
        """
        if self.objects and not any(self.objects.values()):
            raise ValueError(
                f"DATASETS.TRAIN: no objects in the annotations of {', '.join(self.objects)}. "
                "(Those with iscrowd 1 are none.)"
            )
        if self.objects.keys() >= set(self.cfg.DATASETS.TRAIN):
            self._tell_untaught(self.with_objects["TEST"] - self.with_objects["TRAIN"])
        both = self.files["TRAIN"] & self.files["TEST"]
        if both:
            logger.warning(
                f"{len(both)} of the {len(self.files['TEST'])} images of DATASETS.TEST are also in "
                f"DATASETS.TRAIN, such as {min(both)}: the AP does not measure generalisation."
            )

    def _check_set(self, name: str, part: str) -> Optional[Sequence[str]]:
        """Returns: the set's class names; None if they are not known."""
        key = f"DATASETS.{part}"
        if name not in DatasetCatalog.list():
            near = nearest(name, DatasetCatalog.list(), count=3)
            hint = f"Did you mean {' or '.join(near)}?" if near else "Is it in COCO_FORMAT?"
            raise ValueError(f"{key}: no data set is registered as {name!r}. {hint}")
        metadata = MetadataCatalog.get(name)
        check_files(metadata, self.owned.get(name, key))
        if part == "TEST":
            check_evaluator(metadata)
        is_coco = metadata.get("evaluator_type") == "coco"
        if is_coco and metadata.get("json_file") and metadata.get("image_root"):
            return self._check_coco(metadata, part)
        return metadata.get("thing_classes")

    def _check_coco(self, metadata: Metadata, part: str) -> Sequence[str]:
        name, json_file, folder = metadata.name, metadata.json_file, metadata.image_root
        key = self.owned.get(name, f"DATASETS.{part}")
        summary = look_at(json_file, key)
        if name not in self.owned and part == "TEST" and not summary.has_annotations:
            return summary.classes  # a test set without public annotations: inference only
        summary = read_summary(json_file, key)
        blame = f"{key}: {json_file}"
        check_role(summary, part, self.cfg, self.meta_architecture, blame)
        paths = _paths(summary.images, folder)
        if part == "TRAIN":
            if name not in self.objects:
                self._tell_twice(name, paths)
            self.objects[name] = summary.facts.objects
        self.with_objects[part] |= summary.facts.classes
        if not paths <= self.files[part]:
            check_images(summary.images, folder, part, blame)
        self.files[part] |= paths
        return summary.classes

    def _tell_twice(self, name: str, paths: Set[str]) -> None:
        """Warn of images of another training set, such as labelled ones with pseudo-labels too."""
        both = paths & self.files["TRAIN"]
        if both:
            logger.warning(
                f"{len(both)} of the {len(paths)} images of {name} are also in another set of "
                f"DATASETS.TRAIN, such as {min(both)}: each is learnt twice, and what only one of "
                "the two sets has labelled is background in the other."
            )

    def _tell_untaught(self, classes: Set[str]) -> None:
        if classes:
            logger.warning(
                f"{len(classes)} of the classes with objects in DATASETS.TEST, such as "
                f"{min(classes)!r}, have none in DATASETS.TRAIN: a student does not learn to find "
                "them, and their AP, about 0, is part of the mean."
            )

    def _learnt_elsewhere(self) -> Optional[Tuple[str, Sequence[str]]]:
        """First training set and its classes, for an evaluation that skips the training sets."""
        try:
            names = names_in_sets(self.cfg.DATASETS.TRAIN, coco_json_files(self.cfg))
        except ValueError:  # an invalid JSON, which this evaluation does not read
            return None
        count = num_classes(self.cfg, self.meta_architecture)
        # Training sets inherited from a base config need not be this detector's.
        is_ours = names and (count is None or count == len(names))
        return (self.cfg.DATASETS.TRAIN[0], names) if is_ours else None


def _paths(images: Sequence[ImageEntry], folder: str) -> Set[str]:
    """Of the files themselves, also where a split is a folder of links to them."""
    by_folder: Dict[str, List[str]] = defaultdict(list)
    for image in images:
        inner, name = os.path.split(os.path.join(folder, image.file_name))
        by_folder[inner].append(name)
    paths: Set[str] = set()
    for inner, names in by_folder.items():
        inner = os.path.realpath(inner)
        links = _links(inner)
        found = {os.path.join(inner, x) for x in names}
        paths |= {os.path.realpath(x) if x in links else x for x in found}
    return paths


def _links(folder: str) -> Set[str]:
    """The folder is listed, as resolving each file is slow on some disks."""
    try:
        with os.scandir(folder) as entries:
            return {x.path for x in entries if x.is_symlink()}
    except OSError:
        return set()
