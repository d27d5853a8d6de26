from itertools import count
from typing import Any, Dict, Iterator, List, Tuple

from torch.utils.data import Sampler

from detectron2.config import CfgNode
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler

# An image of a batch: its index in the data set, and its place in the endless stream of images
Pick = Tuple[int, int]


class ResumableBatchSampler(Sampler):
    """
    Endless batches of picks, starting at any iteration. It handles indices only, so skipping to a
    late iteration loads no image.

    All processes draw the same stream and the same total batches; each takes every
    `world_size`-th image of a batch. The images of an iteration therefore do not depend on the
    number of processes.
    """

    def __init__(
        self,
        *,
        sampler: Sampler,
        groups: List[int],
        total_batch_size: int,
        start_iter: int,
        rank: int,
        world_size: int,
    ):
        """
        Args:
            sampler: a training sampler of Detectron2, seeded alike in all processes
            groups: group of each image of the data set; a batch holds images of one group
            total_batch_size: images per iteration over all processes
            start_iter: the iteration of the first batch
        """
        self.sampler = sampler
        self.groups = groups
        self.total_batch_size = total_batch_size
        self.start_iter = start_iter
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[List[Pick]]:
        for iteration, batch in zip(count(), self._total_batches()):
            if iteration >= self.start_iter:
                first = iteration * self.total_batch_size
                picks = [(index, first + i) for i, index in enumerate(batch)]
                yield picks[self.rank :: self.world_size]

    def _total_batches(self) -> Iterator[List[int]]:
        waiting: Dict[int, List[int]] = {}
        # The samplers' __iter__ already shards by process. Batches are formed before sharding, so
        # that grouping gives the same batches for every number of processes.
        for index in self.sampler._infinite_indices():
            batch = waiting.setdefault(self.groups[index], [])
            batch.append(index)
            if len(batch) == self.total_batch_size:
                yield waiting.pop(self.groups[index])


def build_sampler(cfg: CfgNode, dataset_dicts: List[Dict[str, Any]], seed: int) -> Sampler:
    """Returns: the Detectron2 sampler named by DATALOADER.SAMPLER_TRAIN, with a seed."""
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return TrainingSampler(len(dataset_dicts), seed=seed)
    if name == "RepeatFactorTrainingSampler":
        # Detectron2 0.5 has no REPEAT_SQRT and always takes the square root.
        sqrt = {"sqrt": cfg.DATALOADER.REPEAT_SQRT} if "REPEAT_SQRT" in cfg.DATALOADER else {}
        repeat_factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset_dicts, cfg.DATALOADER.REPEAT_THRESHOLD, **sqrt
        )
        return RepeatFactorTrainingSampler(repeat_factors, seed=seed)
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}: use TrainingSampler or RepeatFactorTrainingSampler"
    )
