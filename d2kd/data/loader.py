import itertools
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Union

import torch
from torch.utils.data import DataLoader, Sampler

from detectron2.config import CfgNode, configurable
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from .batches import ResumableBatchSampler, build_sampler
from .mapper import CheckedMapper
from .seeded import SeededDataset
from .unlabelled import batch_sizes, find_unlabelled

# Beside the run's seed, so that two images at one place of their streams are not augmented alike
UNLABELLED_SEED = 1_000_003


class ResumableLoader:
    """
    Endless training batches that can be resumed at any iteration.

    The batch of iteration i (its images, their order and their augmentation) depends only on the
    seed, i, the rank, the world size and the config: neither on DATALOADER.NUM_WORKERS nor on the
    iteration at which the process started. For a given seed and SOLVER.IMS_PER_BATCH the batches of
    all ranks together hold the same samples for every world size, and no place in the stream of
    images goes to two ranks. (One image can be in a batch twice: at the end of an epoch, when the
    sampler repeats rare classes, or when the mapper rejected an image.)

    Attributes:
        start_iter: iteration of the first batch. Set it before the first `next()`, which starts
            the workers.
    """

    @configurable
    def __init__(
        self,
        *,
        dataset_dicts: List[Dict[str, Any]],
        mapper: Callable[[Dict[str, Any]], Optional[Dict[str, Any]]],
        sampler: Sampler,
        total_batch_size: int,
        seed: int,
        aspect_ratio_grouping: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        """
        Args:
            dataset_dicts: in Detectron2's format
            mapper: dataset dict -> sample, or None to draw another image instead
            sampler: a training sampler of Detectron2, seeded alike in all processes
            total_batch_size: images per iteration over all processes
            seed: >= 0, for augmentation, the same in all processes
            aspect_ratio_grouping: a total batch has only images wider than high, or only others
            num_workers: loader processes; 0: load in this one
            pin_memory: see :class:`torch.utils.data.DataLoader`
        """
        world_size = comm.get_world_size()
        if total_batch_size < 1 or total_batch_size % world_size:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH is {total_batch_size}: it must be a positive multiple of "
                f"the number of processes, {world_size}"
            )
        if seed < 0:
            raise ValueError(
                f"The loader's seed is {seed}: it must be >= 0 and the same in all processes. "
                "For SEED -1, draw one with detectron2.utils.comm.shared_random_seed()."
            )
        self.start_iter = 0
        self.dataset = SeededDataset(dataset_dicts, mapper, seed)
        self.sampler = sampler
        self.total_batch_size = total_batch_size
        self.groups = [
            int(aspect_ratio_grouping and x["width"] > x["height"]) for x in dataset_dicts
        ]
        self.num_workers = num_workers
        self.pin_memory = pin_memory

    @property
    def images(self) -> Sequence[Dict[str, Any]]:
        """All that it draws from, in Detectron2's format."""
        return self.dataset.dataset

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        seed: int,
        batch_size: Optional[int] = None,
        mapper: Optional[Callable[..., Any]] = None,
    ) -> Dict[str, Any]:
        if not cfg.DATASETS.TRAIN:
            raise ValueError("DATASETS.TRAIN is empty: list the data sets to train on.")
        keypoints, proposals = cfg.MODEL.KEYPOINT_ON, cfg.MODEL.LOAD_PROPOSALS
        dataset_dicts = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if keypoints else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if proposals else None,
        )
        if not isinstance(dataset_dicts, list):
            raise ValueError(
                f"DATASETS.TRAIN {cfg.DATASETS.TRAIN} is a {type(dataset_dicts).__name__}: "
                "only data sets that are lists of dicts can be resumed"
            )
        if mapper is None:
            _check_labelled(dataset_dicts)
        return {
            "dataset_dicts": dataset_dicts,
            "mapper": mapper or CheckedMapper(cfg, is_train=True),
            "sampler": build_sampler(cfg, dataset_dicts, max(seed, 0)),
            "total_batch_size": batch_size or cfg.SOLVER.IMS_PER_BATCH,
            "seed": seed,
            **_how_to_load(cfg),
        }

    def __iter__(self) -> Iterator[List[Dict[str, Any]]]:
        """Yields: lists of total_batch_size / world_size samples; see the mapper for a sample."""
        # As a generator function, nothing below runs before the first next().
        yield from DataLoader(
            self.dataset,
            batch_sampler=ResumableBatchSampler(
                sampler=self.sampler,
                groups=self.groups,
                total_batch_size=self.total_batch_size,
                start_iter=self.start_iter,
                rank=comm.get_rank(),
                world_size=comm.get_world_size(),
            ),
            num_workers=self.num_workers,
            collate_fn=_as_list,
            pin_memory=self.pin_memory,
            # Without its own generator, the DataLoader would draw from the global one.
            generator=torch.Generator(),
        )


def _check_labelled(dataset_dicts: Sequence[Dict[str, Any]]) -> None:
    # Detectron2's mapper would leave them without "instances", as images of DISTILL.UNLABELLED are:
    # the student's own losses would never see them.
    without = [x for x in dataset_dicts if "annotations" not in x]
    if without:
        raise ValueError(
            f"DATASETS.TRAIN: {len(without)} of {len(dataset_dicts)} images, such as "
            f'{without[0].get("file_name")}, have no "annotations"; of an image without objects '
            "they are []. Images without labels belong into DISTILL.UNLABELLED.SETS."
        )


def _as_list(samples: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Detectors take lists of samples of different sizes, so nothing is stacked."""
    return samples


class MixedLoader:
    """
    Batches of two loaders, the one's images behind the other's. The labelled ones are those of a
    run that has no others.
    """

    def __init__(self, labelled: ResumableLoader, unlabelled: ResumableLoader):
        self.labelled, self.unlabelled = labelled, unlabelled
        self.start_iter = 0

    @property
    def images(self) -> Iterable[Dict[str, Any]]:
        return itertools.chain(self.labelled.images, self.unlabelled.images)

    def __iter__(self) -> Iterator[List[Dict[str, Any]]]:
        """Yields: as :class:`ResumableLoader`; samples without labels have no "instances"."""
        self.labelled.start_iter = self.unlabelled.start_iter = self.start_iter
        for labelled, unlabelled in zip(self.labelled, self.unlabelled):
            yield labelled + unlabelled


def build_train_loader(
    cfg: CfgNode, seed: int, mapper: Optional[Callable[..., Any]] = None
) -> Union[ResumableLoader, MixedLoader]:
    """
    Args:
        cfg: Detectron2's keys DATASETS, DATALOADER, INPUT, SOLVER.IMS_PER_BATCH
        seed: >= 0, the same in all processes
        mapper: None: :class:`CheckedMapper`, Detectron2's mapper with checks of the image
    """
    count, count_unlabelled = batch_sizes(cfg)
    labelled = ResumableLoader(cfg, seed, count, mapper=mapper) if count else None
    if not count_unlabelled:
        return labelled
    images = find_unlabelled(cfg)
    unlabelled = ResumableLoader(
        dataset_dicts=images,
        mapper=mapper or CheckedMapper(cfg, is_train=True),
        sampler=TrainingSampler(len(images), seed=seed),
        total_batch_size=count_unlabelled,
        seed=seed + UNLABELLED_SEED,
        **_how_to_load(cfg),
    )
    return MixedLoader(labelled, unlabelled) if labelled else unlabelled


def _how_to_load(cfg: CfgNode) -> Dict[str, Any]:
    return {
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "pin_memory": cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available(),
    }
