import json
import os
import tempfile
import unittest

import cv2
import numpy as np

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from d2kd.data import add_data_config, register_datasets
from d2kd.data.shapes import SPLITS


class TestRegisterDatasets(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.root = temporary.name
        for name in set(SPLITS) & set(DatasetCatalog.list()):  # other tests may have left them
            self._forget(name)
        before = set(DatasetCatalog.list())
        self.addCleanup(lambda: [self._forget(n) for n in set(DatasetCatalog.list()) - before])
        self.content = {
            "images": [{"id": 7, "file_name": "a.png", "width": 8, "height": 6}],
            "annotations": [
                {"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 1, 4, 3], "area": 12}
            ],
            "categories": [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}],
        }
        self.content["annotations"][0]["iscrowd"] = 0
        self.images = os.path.join(self.root, "images")
        os.mkdir(self.images)
        cv2.imwrite(os.path.join(self.images, "a.png"), np.zeros((6, 8, 3), dtype=np.uint8))

    @staticmethod
    def _forget(name: str) -> None:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)

    def _write(self, name: str = "a.json") -> str:
        path = os.path.join(self.root, name)
        with open(path, "w") as f:
            json.dump(self.content, f)
        return path

    def _cfg(self, **entry: str) -> CfgNode:
        cfg = get_cfg()
        add_data_config(cfg)
        entry = {"NAME": "toy_train", "JSON": self._write(), "IMAGES": self.images, **entry}
        cfg.DATASETS.COCO_FORMAT = [{k: v for k, v in entry.items() if v is not None}]
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy_train",), ("toy_train",)
        cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
        cfg.MODEL.RETINANET.NUM_CLASSES = 2
        return cfg

    def _shapes(self, **changes: int) -> CfgNode:
        cfg = self._cfg()
        shapes = {"ROOT": self.root, "NUM_TRAIN": 3, "NUM_VAL": 2, **changes}
        cfg.DATASETS.SHAPES.merge_from_other_cfg(CfgNode(shapes))
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("d2kd_shapes_train",), ("d2kd_shapes_val",)
        cfg.MODEL.RETINANET.NUM_CLASSES = 6
        return cfg

    def _check_error(self, cfg: CfgNode, *parts: str, error: type = ValueError) -> None:
        with self.assertRaises(error) as caught:
            register_datasets(cfg)
        for part in parts:
            self.assertIn(part, str(caught.exception))

    def test_registers_and_loads(self):
        cfg = self._cfg()
        register_datasets(cfg)
        register_datasets(cfg)
        (loaded,) = get_detection_dataset_dicts(["toy_train"])
        self.assertEqual(loaded["image_id"], 7)
        # Class order is that of the ids: dog is 0, cat is 1.
        self.assertEqual(loaded["annotations"][0]["category_id"], 1)

    def test_from_yaml(self):
        path = os.path.join(self.root, "a.yaml")
        with open(path, "w") as f:
            f.write(f"DATASETS:\n  COCO_FORMAT:\n  - {{NAME: b, JSON: {self._write()}, IMAGES: .}}")
        cfg = self._cfg()
        cfg.merge_from_file(path)
        self.assertEqual(cfg.DATASETS.COCO_FORMAT[0]["NAME"], "b")
        self.assertEqual(CfgNode.load_cfg(cfg.dump()).DATASETS.COCO_FORMAT[0]["NAME"], "b")

    def test_entry_keys(self):
        key = "DATASETS.COCO_FORMAT[0]"
        self._check_error(self._cfg(JSN="x"), key, "'JSN'", "mean JSON")
        self._check_error(self._cfg(IMAGES=None), key, "IMAGES", "toy_train")
        self._check_error(self._cfg(NAME="d2kd_shapes_val"), key, "d2kd_shapes_val")

    def test_name_taken_with_other_paths(self):
        register_datasets(self._cfg())
        other = self._write("b.json")
        self._check_error(self._cfg(JSON=other), "toy_train", "a.json", other)

    def test_unknown_name_has_near_matches(self):
        cfg = self._cfg()
        cfg.DATASETS.TEST = ("toy_trian",)
        self._check_error(cfg, "DATASETS.TEST", "'toy_trian'", "toy_train")
        register_datasets(cfg, parts=("TRAIN",))

    def test_missing_files(self):
        missing = os.path.join(self.root, "none")
        for entry in ({"JSON": missing}, {"IMAGES": missing}):
            key = "DATASETS.COCO_FORMAT[0]"
            self._check_error(
                self._cfg(**entry),
                key,
                missing,
                "paths start at the folder you start in",
                error=FileNotFoundError,
            )
            self._forget("toy_train")
        self.content["images"][0]["file_name"] = "b.png"
        path = os.path.join(self.images, "b.png")
        self._check_error(self._cfg(), path, "a.json", error=FileNotFoundError)

    def test_missing_files_of_detectron2s_own_sets(self):
        cfg = self._cfg()
        cfg.DATASETS.TEST = ("coco_2017_val_100_panoptic_separated",)
        cfg.DATASETS.TRAIN = ("coco_2014_train",)
        path = MetadataCatalog.get("coco_2014_train").json_file
        if not os.path.exists(path):
            self._check_error(cfg, "DATASETS.TRAIN", path, error=FileNotFoundError)

    def test_not_coco(self):
        for part, value, message in [
            ("images", [], '"images" is empty'),
            ("annotations", None, 'no list "annotations"'),
            ("categories", [{"id": 5}], 'categories[0] has no "name"'),
            ("categories", [{"id": 4, "name": "cat"}], "category_id 5"),
            ("images", 2 * self.content["images"], "images has the id 7 twice"),
            ("annotations", 2 * self.content["annotations"], "annotations has the id 1 twice"),
            ("images", [self._image("../secret.png")], "leads out of the image folder"),
            ("images", [self._image("a/../../secret.png")], "leads out of the image folder"),
            ("images", [self._image("/etc/secret.png")], "is an absolute path; it must be rel"),
            ("annotations", [self._annotation([1, 1, -4, 3])], "the bbox [1, 1, -4, 3]"),
            ("annotations", [self._annotation([1, 1, 4])], "the bbox [1, 1, 4]"),
            ("annotations", [self._annotation([1, 1, float("nan"), 3])], "the bbox [1, 1, nan, 3]"),
        ]:
            good = self.content[part]
            self.content[part] = value
            self._check_error(
                self._cfg(JSON=self._write(f"{abs(hash(message))}.json")), message, ".json"
            )
            self.content[part] = good
            self._forget("toy_train")
        path = self._write("text.json")
        with open(path, "w") as f:
            f.write("not json")
        self._check_error(self._cfg(JSON=path), path)

    def _image(self, file_name: str) -> dict:
        return {**self.content["images"][0], "file_name": file_name}

    def _annotation(self, bbox: list) -> dict:
        return {**self.content["annotations"][0], "bbox": bbox}

    def test_image_in_a_folder_inside_is_found(self):
        os.mkdir(os.path.join(self.images, "inner"))
        os.rename(os.path.join(self.images, "a.png"), os.path.join(self.images, "inner", "a.png"))
        self.content["images"] = [self._image("inner/../inner/a.png")]
        register_datasets(self._cfg(), meta_architecture="")

    def test_number_of_classes(self):
        cfg = self._cfg()
        cfg.MODEL.RETINANET.NUM_CLASSES = 80
        self._check_error(cfg, "MODEL.RETINANET.NUM_CLASSES is 80", "toy_train has 2", "dog, cat")
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
        register_datasets(cfg, meta_architecture="GeneralizedRCNN")
        register_datasets(cfg, meta_architecture="FCOS")  # has no key here, so no check

    def test_shapes_are_drawn_where_named(self):
        cfg = self._shapes()
        register_datasets(cfg, parts=("TEST",))
        self.assertNotIn("d2kd_shapes_train", DatasetCatalog.list())
        register_datasets(cfg)
        self.assertEqual(len(get_detection_dataset_dicts(cfg.DATASETS.TRAIN)), 3)
        register_datasets(self._shapes(NUM_TRAIN=5))
        self.assertEqual(len(get_detection_dataset_dicts(cfg.DATASETS.TRAIN)), 5)
        cfg.MODEL.RETINANET.NUM_CLASSES = 80
        self._check_error(cfg, "MODEL.RETINANET.NUM_CLASSES is 80", "d2kd_shapes_train has 6")


if __name__ == "__main__":
    unittest.main()
