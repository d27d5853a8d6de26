"""Which category of the labelled set each class of the detector is."""

import pytest
from pycocotools.coco import COCO

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from d2kd import load_config
from d2kd.labelling import LabelledSet, category_ids
from d2kd.teacher import Teacher
from tests.helpers.toys import detector_config


@pytest.mark.parametrize(
    "use_teacher, expected",
    # The teacher's cow and cat; the detector's own classes are those of the set
    [(True, {0: 9, 2: 5}), (False, {0: 5, 1: 7, 2: 9})],
)
def test_class_of_a_teacher_is_the_category_of_its_name_wherever_it_stands(
    use_teacher: bool, expected: dict, forget_sets: None
) -> None:
    DatasetCatalog.register("toy_labelled", list)
    MetadataCatalog.get("toy_labelled").thing_classes = ["cat", "dog", "cow"]
    categories = [{"id": i, "name": x} for i, x in ((5, "cat"), (7, "dog"), (9, "cow"))]
    labelled = LabelledSet("toy_labelled", [], COCO(), categories)
    teacher = Teacher(build_model(detector_config("retinanet")), "BGR", {}, ("cow", "mouse", "cat"))
    cfg = load_config(opts=["DATASETS.TRAIN", "('d2kd_shapes_train',)"])  # whose classes are others
    assert category_ids(cfg, teacher, labelled, use_teacher) == expected
