import json
import os
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pycocotools.mask

from detectron2.config import CfgNode, get_cfg

from d2kd import load_config
from d2kd.data import add_data_config, make_shapes
from d2kd.data.outlines import CLASSES, area, place
from d2kd.data.preview import contact_sheet
from d2kd.data.shapes import draw_one, read_settings


def _cfg(root: str, **changes: object) -> CfgNode:
    cfg = get_cfg()
    add_data_config(cfg)
    cfg.DATASETS.SHAPES.merge_from_other_cfg(CfgNode({"ROOT": root, "NUM_TRAIN": 8, "NUM_VAL": 4}))
    cfg.DATASETS.SHAPES.merge_from_other_cfg(CfgNode(changes))
    return cfg


def _read(folder: str) -> dict:
    """Returns: the annotations of a split."""
    with open(os.path.join(folder, "annotations.json")) as f:
        return json.load(f)


def _bytes(folder: str) -> list:
    """Returns: the content of all images in their order."""
    return [path.read_bytes() for path in sorted(Path(folder, "images").iterdir())]


class TestShapes(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.root = temporary.name

    def test_same_settings_give_same_bytes(self):
        a = make_shapes(_cfg(os.path.join(self.root, "a")), "train")
        np.random.seed(1)  # the global generator must have no say
        b = make_shapes(_cfg(os.path.join(self.root, "b")), "train")
        self.assertEqual(_bytes(a), _bytes(b))
        self.assertEqual(_read(a), _read(b))

    def test_more_images_keep_the_earlier_ones(self):
        few = make_shapes(_cfg(self.root), "train")
        many = make_shapes(_cfg(self.root, NUM_TRAIN=12), "train")
        self.assertNotEqual(few, many)
        self.assertEqual(_bytes(few), _bytes(many)[:8])
        kept = _read(few)["annotations"]
        self.assertEqual(kept, _read(many)["annotations"][: len(kept)])

    def test_splits_and_seeds_differ(self):
        train = _bytes(make_shapes(_cfg(self.root, NUM_TRAIN=4), "train"))
        val = _bytes(make_shapes(_cfg(self.root), "val"))
        test = _bytes(make_shapes(_cfg(self.root, NUM_TEST=4), "test"))
        other = _bytes(make_shapes(_cfg(self.root, SEED=1), "val"))
        self.assertEqual(len(set(train + val + test + other)), 16)

    def test_training_and_validation_images_are_those_of_before_the_test_split(self):
        # Names are made of all that the bytes depend on, so sets drawn earlier are found again.
        cfg = load_config(opts=["DATASETS.SHAPES.ROOT", self.root])
        with mock.patch("d2kd.data.shapes._write"):
            names = [os.path.basename(make_shapes(cfg, x)) for x in ("train", "val")]
        self.assertEqual(names, ["train_7c00ba2f8aa7", "val_20b8aaa629f7"])
        for split, seed in {"train": [0, 0, 3], "val": [0, 1, 3], "test": [0, 2, 3]}.items():
            with mock.patch("d2kd.data.shapes.draw") as draw:
                draw_one(read_settings(cfg.DATASETS.SHAPES, split), 3)
            drawn = draw.call_args.args[0].integers(2**60, size=4)
            expected = np.random.default_rng(seed).integers(2**60, size=4)
            np.testing.assert_array_equal(drawn, expected)

    def test_second_use_draws_nothing(self):
        folder = make_shapes(_cfg(self.root), "val")
        with mock.patch("d2kd.data.shapes.draw", side_effect=AssertionError("drawn again")):
            # The other split's number of images must not matter either.
            self.assertEqual(make_shapes(_cfg(self.root, NUM_TRAIN=9), "val"), folder)

    def test_boxes_are_inside_and_every_image_has_one(self):
        content = _read(make_shapes(_cfg(self.root, NUM_VAL=100), "val"))
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            self.assertTrue(0 <= x < x + w <= 144 and 0 <= y < y + h <= 144, annotation)
            self.assertEqual(annotation["area"], w * h)
        self.assertEqual(
            {a["image_id"] for a in content["annotations"]}, {i["id"] for i in content["images"]}
        )
        self.assertEqual([c["name"] for c in content["categories"]], list(CLASSES))
        self.assertEqual({a["category_id"] for a in content["annotations"]}, set(range(1, 7)))

    def test_masks_are_of_the_visible_pixels_of_the_same_images(self):
        without = make_shapes(_cfg(self.root), "train")
        folder = make_shapes(_cfg(self.root, MASKS=True), "train")
        self.assertNotEqual(folder, without)
        self.assertEqual(_bytes(folder), _bytes(without))
        content, plain = _read(folder), _read(without)
        by_image = {}
        for annotation, other in zip(content["annotations"], plain["annotations"]):
            mask = pycocotools.mask.decode(annotation["segmentation"])
            self.assertEqual(annotation["area"], mask.sum())
            self.assertEqual(annotation["bbox"], other["bbox"])
            rows, columns = mask.nonzero()
            x, y, w, h = annotation["bbox"]  # the mask's own
            ends = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            self.assertEqual([x, y, w, h], ends)
            covered = by_image.setdefault(annotation["image_id"], np.zeros_like(mask))
            covered += mask
        self.assertEqual(max(x.max() for x in by_image.values()), 1, "no pixel is of two objects")

    def test_all_of_cocos_area_ranges_are_populated(self):
        content = _read(make_shapes(_cfg(self.root, NUM_VAL=200), "val"))
        areas = np.array([a["area"] for a in content["annotations"]])
        small, large = (areas < 32**2).mean(), (areas > 96**2).mean()
        self.assertGreater(small, 0.15)
        self.assertGreater(large, 0.04)
        self.assertGreater(1 - small - large, 0.4)

    def test_box_fits_the_drawn_object(self):
        # One bright or dark object on a background without texture: its box can be measured.
        settings = {"MAX_OBJECTS": 1, "CLUTTER": 0, "NOISE": 0.0, "BLUR": 0.0, "MIN_SIZE": 40}
        folder = make_shapes(_cfg(self.root, **settings), "val")
        content = _read(folder)
        for entry, annotation in zip(content["images"], content["annotations"]):
            image = cv2.imread(os.path.join(folder, "images", entry["file_name"]))
            x, y, w, h = annotation["bbox"]
            gradient = np.abs(np.diff(cv2.GaussianBlur(image, (0, 0), 2).astype(float), axis=1))
            row = gradient[y + h // 2].sum(axis=-1)
            # The strongest edge of the row through the middle lies in the box or on its border.
            self.assertTrue(x - 3 <= row.argmax() <= x + w + 3, (annotation, row.argmax()))

    def test_an_image_has_an_object_even_where_no_room_is_found(self):
        # With a single try, most large objects would be left out for sticking out.
        cfg = _cfg(self.root, MIN_SIZE=120, MIN_VISIBLE=0.9, NUM_VAL=10, MAX_OBJECTS=1)
        with mock.patch("d2kd.data.drawing.TRIES", 1):
            content = _read(make_shapes(cfg, "val"))
        self.assertEqual([a["image_id"] for a in content["annotations"]], list(range(1, 11)))
        for annotation in content["annotations"]:
            self.assertGreaterEqual(max(annotation["bbox"][2:]), 119)

    def test_killed_first_use_leaves_no_half_set(self):
        with mock.patch("d2kd.data.shapes.cv2.imwrite", side_effect=KeyboardInterrupt):
            with self.assertRaises(KeyboardInterrupt):
                make_shapes(_cfg(self.root), "val")
        self.assertEqual(os.listdir(os.path.join(self.root, "d2kd_shapes")), [])
        self.assertEqual(len(_bytes(make_shapes(_cfg(self.root), "val"))), 4)

    def test_loser_of_a_race_takes_the_winners_set(self):
        rename = os.rename

        def others_first(source, target):
            rename(source, target)
            raise OSError("Directory not empty")

        with mock.patch("d2kd.data.shapes.os.rename", side_effect=others_first):
            folder = make_shapes(_cfg(self.root), "val")
        self.assertEqual(len(_bytes(folder)), 4)

    def test_wrong_settings_are_named(self):
        for key, value in [("MIN_OBJECTS", 6), ("MIN_VISIBLE", 1.0), ("MIN_SIZE", 500)]:
            with self.assertRaisesRegex(ValueError, rf"SHAPES.{key} must be in .* got {value}"):
                make_shapes(_cfg(self.root, **{key: value}), "val")

    def test_contact_sheet_of_a_small_set(self):
        sheet = contact_sheet(make_shapes(_cfg(self.root), "val"), rows=2, columns=3, zoom=2)
        self.assertEqual(sheet.shape, (2 * 292, 3 * 292, 3))
        self.assertTrue((sheet[292:, 292:] == 255).all())


class TestOutlines(unittest.TestCase):
    def test_placed_figure_has_the_size_and_centre(self):
        rng = np.random.default_rng(0)
        for name, outline in CLASSES.items():
            placed = place(outline(rng), rng, size=50, centre=np.array([30, 20]), stretch=1.3)
            points = np.concatenate(placed)
            low, high = points.min(axis=0), points.max(axis=0)
            self.assertAlmostEqual((high - low).max(), 50, msg=name)
            np.testing.assert_allclose((low + high) / 2, [30, 20], err_msg=name)

    def test_area(self):
        square = np.array([[0, 0], [4, 0], [4, 4], [0, 4]])
        self.assertEqual(area([square]), 16)
        self.assertEqual(area([square, square[::-1] / 2]), 16 - 4)


if __name__ == "__main__":
    unittest.main()
