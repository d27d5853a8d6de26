"""What is written beside the boxes: where the images are, and the sets of a training on them."""

import yaml

from d2kd import load_config
from d2kd.labelling.write import label_json, training_yaml


def test_files_are_named_from_the_folder_of_the_images_on() -> None:
    images = [{"image_id": 3, "file_name": "/data/new/day 1/a.png", "width": 6, "height": 4}]
    content = label_json({}, [], images, [], "/data/new")
    assert content["images"] == [{"id": 3, "file_name": "day 1/a.png", "width": 6, "height": 4}]


def test_yaml_keeps_the_sets_of_the_config() -> None:
    cfg = load_config()
    own = {"NAME": "mine", "JSON": "a.json", "IMAGES": "my images"}
    cfg.DATASETS.COCO_FORMAT, cfg.DATASETS.TRAIN = [own], ("mine",)
    labels = {"NAME": "pseudo_new", "JSON": "out/new.json", "IMAGES": "new: images"}
    assert yaml.safe_load(training_yaml(cfg, "out/new.json", "new: images")) == {
        "DATASETS": {"COCO_FORMAT": [own, labels], "TRAIN": ["mine", "pseudo_new"]}
    }
