import random
import tempfile
import unittest
from collections import Counter
from itertools import islice
from unittest import mock

import numpy as np
import torch

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2kd.data import ResumableLoader, add_data_config, build_train_loader, register_datasets
from d2kd.data.batches import build_sampler
from d2kd.data.seeded import SeededDataset

NUM_IMAGES = 10


class Recorder:
    """A mapper that shows which image it was given and what it draws from each generator."""

    def __init__(self, refused: tuple = ()):
        self.refused = refused

    def __call__(self, d: dict) -> dict:
        if d["image_id"] in self.refused:
            return None
        draws = (random.random(), np.random.rand(), torch.rand(1).item())
        return {"image_id": d["image_id"], "wide": d["width"] > d["height"], "draws": draws}


def _dataset_dicts() -> list:
    """Returns: images of which every third is wide, and only the first has category 1."""
    return [
        {
            "image_id": i,
            "width": 8 if i % 3 == 0 else 4,
            "height": 6,
            "annotations": [{"category_id": int(i == 0), "iscrowd": 0}],
        }
        for i in range(NUM_IMAGES)
    ]


def _batches(cfg: CfgNode, start: int, stop: int, rank=0, world_size=1, seed=3, **kwargs) -> list:
    """Returns: the batches of iterations start to stop."""
    with mock.patch("d2kd.data.loader.comm.get_rank", return_value=rank), mock.patch(
        "d2kd.data.loader.comm.get_world_size", return_value=world_size
    ):
        loader = build_train_loader(cfg, seed, mapper=Recorder(**kwargs))
        loader.start_iter = start
        return list(islice(iter(loader), stop - start))


class TestLoader(unittest.TestCase):
    def setUp(self):
        DatasetCatalog.register("toy_loader", _dataset_dicts)
        self.addCleanup(DatasetCatalog.remove, "toy_loader")
        self.addCleanup(MetadataCatalog.pop, "toy_loader", None)

    def _cfg(self, **changes: object) -> CfgNode:
        cfg = get_cfg()
        add_data_config(cfg)
        cfg.DATASETS.TRAIN = ("toy_loader",)
        cfg.SOLVER.IMS_PER_BATCH = 4
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
        cfg.DATALOADER.merge_from_other_cfg(CfgNode(changes))
        return cfg

    def test_resumed_equals_uninterrupted_with_any_number_of_workers(self):
        for grouping in (False, True):
            cfg = self._cfg(ASPECT_RATIO_GROUPING=grouping)
            whole = _batches(cfg, 0, 9)
            self.assertEqual(whole[6:], _batches(cfg, 6, 9))
            cfg.DATALOADER.NUM_WORKERS = 2
            self.assertEqual(whole[6:], _batches(cfg, 6, 9))

    def test_images_that_nobody_labelled_are_no_labelled_ones(self):
        for count in (1, NUM_IMAGES):
            images = _dataset_dicts()
            for image in images[-count:]:
                image.update(file_name="a.png")
                del image["annotations"]
            DatasetCatalog.register("half_labelled", lambda images=images: images)
            self.addCleanup(MetadataCatalog.pop, "half_labelled", None)
            cfg = self._cfg(FILTER_EMPTY_ANNOTATIONS=False)
            cfg.DATASETS.TRAIN = ("half_labelled",)
            message = f'{count} of 10 images, such as a.png, have no "annotations"'
            with self.assertRaisesRegex(ValueError, message):
                build_train_loader(cfg, 3)
            build_train_loader(cfg, 3, mapper=Recorder())  # which may know labels from elsewhere
            DatasetCatalog.remove("half_labelled")

    def test_iterations_and_seeds_differ(self):
        first, second = _batches(self._cfg(), 0, 2)
        self.assertEqual(len({d for sample in first + second for d in sample["draws"]}), 24)
        self.assertNotEqual(first, _batches(self._cfg(), 0, 1, seed=4)[0])

    def test_a_pass_over_the_data_has_every_image_once(self):
        cfg = self._cfg()
        cfg.SOLVER.IMS_PER_BATCH = 5
        for i in (0, 2):
            both = sum(_batches(cfg, i, i + 2), [])
            self.assertEqual({s["image_id"] for s in both}, set(range(NUM_IMAGES)))

    def test_ranks_share_the_batch_of_one_process(self):
        cfg = self._cfg(ASPECT_RATIO_GROUPING=True)
        one = _batches(cfg, 2, 6)
        a, b = (_batches(cfg, 2, 6, rank=r, world_size=2) for r in range(2))
        for whole, left, right in zip(one, a, b):
            self.assertEqual(whole[0::2], left)
            self.assertEqual(whole[1::2], right)

    def test_grouped_batches_are_wide_or_not(self):
        for batch in _batches(self._cfg(ASPECT_RATIO_GROUPING=True), 0, 12):
            self.assertEqual(len({sample["wide"] for sample in batch}), 1)

    def test_rare_classes_are_repeated(self):
        # Class 1 is in one of 10 images: with threshold 0.9 it comes sqrt(0.9 / 0.1) = 3 times as
        # often as its share. Class 0 is in 0.9 of the images, which is not below the threshold.
        cfg = self._cfg(SAMPLER_TRAIN="RepeatFactorTrainingSampler", REPEAT_THRESHOLD=0.9)
        cfg.SOLVER.IMS_PER_BATCH = 12
        whole = _batches(cfg, 0, 6)
        for batch in whole:
            self.assertEqual(Counter(s["image_id"] for s in batch)[0], 3)
        self.assertEqual(whole[4:], _batches(cfg, 4, 6))

    def test_global_generators_are_left_alone(self):
        def draws():
            return random.random(), np.random.rand(), torch.rand(1).item()

        def seed():
            random.seed(0), np.random.seed(0), torch.manual_seed(0)

        seed()
        expected = draws()
        for workers in (0, 2):
            seed()
            _batches(self._cfg(NUM_WORKERS=workers), 0, 2)
            self.assertEqual(draws(), expected)

    def test_refused_images_are_replaced_the_same_way_each_time(self):
        whole = _batches(self._cfg(), 0, 8, refused=(0, 1, 2))
        self.assertEqual(whole[5:], _batches(self._cfg(NUM_WORKERS=2), 5, 8, refused=(0, 1, 2)))
        used = {s["image_id"] for batch in whole for s in batch}
        self.assertEqual(used, set(range(3, NUM_IMAGES)))
        with self.assertRaisesRegex(RuntimeError, "100 images in a row"):
            _batches(self._cfg(), 0, 1, refused=tuple(range(NUM_IMAGES)))

    def test_refused_image_is_replaced_by_any_other_and_not_always_by_the_same(self):
        dataset = SeededDataset(_dataset_dicts(), Recorder(refused=(0,)), seed=3)
        found = {dataset[0, place]["image_id"] for place in range(200)}
        self.assertEqual(found, set(range(1, NUM_IMAGES)))

    def test_nothing_starts_before_the_first_batch(self):
        loader = build_train_loader(self._cfg(), 3, mapper=Recorder())
        with mock.patch("d2kd.data.loader.DataLoader", side_effect=AssertionError("started")):
            batches = iter(loader)
        loader.start_iter = 5
        self.assertEqual(next(batches), _batches(self._cfg(), 5, 6)[0])

    def test_skipping_reads_no_image(self):
        cfg, seen = self._cfg(), []
        loader = build_train_loader(cfg, 3, mapper=lambda d: seen.append(d) or {})
        loader.start_iter = 10000
        next(iter(loader))
        self.assertEqual(len(seen), 4)

    def test_wrong_values_are_named(self):
        cfg = self._cfg()
        with self.assertRaisesRegex(ValueError, "SOLVER.IMS_PER_BATCH is 4.*3"):
            _batches(cfg, 0, 1, world_size=3)
        with self.assertRaisesRegex(ValueError, "seed is -1"):
            ResumableLoader(cfg, -1)
        cfg.DATALOADER.SAMPLER_TRAIN = "Trainingsampler"
        with self.assertRaisesRegex(ValueError, "DATALOADER.SAMPLER_TRAIN is 'Trainingsampler'"):
            build_sampler(cfg, _dataset_dicts(), 0)


class TestLoaderOnShapes(unittest.TestCase):
    def test_images_and_boxes_resume_bit_exactly(self):
        with tempfile.TemporaryDirectory() as root:
            cfg = get_cfg()
            add_data_config(cfg)
            shapes = {"ROOT": root, "NUM_TRAIN": 12}
            cfg.DATASETS.SHAPES.merge_from_other_cfg(CfgNode(shapes))
            cfg.DATASETS.TRAIN = ("d2kd_shapes_train",)
            cfg.INPUT.MIN_SIZE_TRAIN, cfg.SOLVER.IMS_PER_BATCH = (96, 112, 128), 4
            cfg.DATALOADER.NUM_WORKERS = 0
            cfg.MODEL.DEVICE = "cpu"
            register_datasets(cfg, "RPNOnly", parts=("TRAIN",))
            self.addCleanup(MetadataCatalog.pop, "d2kd_shapes_train", None)
            self.addCleanup(DatasetCatalog.remove, "d2kd_shapes_train")
            whole = list(islice(iter(build_train_loader(cfg, 1)), 5))
            cfg.DATALOADER.NUM_WORKERS = 2
            resumed = build_train_loader(cfg, 1)
            resumed.start_iter = 3
            for a, b in zip(sum(whole[3:], []), sum(islice(iter(resumed), 2), [])):
                self.assertTrue(torch.equal(a["image"], b["image"]))
                boxes = (x["instances"].gt_boxes.tensor for x in (a, b))
                self.assertTrue(torch.equal(*boxes))


if __name__ == "__main__":
    unittest.main()
