import random
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from torch.utils.data import Dataset

from detectron2.data import DatasetFromList
from detectron2.utils.serialize import PicklableWrapper

from .mapper import image_in_errors

MAX_TRIES = 100  # images in a row that the mapper may reject


class SeededDataset(Dataset):
    """
    Map dataset dicts to training samples. Randomness depends only on the seed and the sample's
    place in the stream, not on the process or on earlier samples.

    Augmentation may draw from `random`, `np.random` (as Detectron2's does) or torch's CPU
    generator. A mapper with its own generator must seed it itself.
    """

    def __init__(
        self,
        dataset_dicts: List[Dict[str, Any]],
        mapper: Callable[[Dict[str, Any]], Optional[Dict[str, Any]]],
        seed: int,
    ):
        """
        Args:
            dataset_dicts: in Detectron2's format
            mapper: dataset dict -> sample; None if the image cannot be used: another is drawn
            seed: >= 0
        """
        self.dataset = DatasetFromList(dataset_dicts, copy=False)
        self.mapper = PicklableWrapper(mapper)  # a lambda can then be sent to spawned workers
        self.seed = seed

    def __getitem__(self, pick: Tuple[int, int]) -> Dict[str, Any]:
        """
        Args:
            pick: index of the dataset dict, and place in the stream of all images
        """
        index, place = pick
        refused = []
        with seeded(self.seed, place):
            while len(refused) < MAX_TRIES:
                image = self.dataset[index]
                with image_in_errors(image):
                    sample = self.mapper(image)
                if sample is not None:
                    return sample
                refused.append(index)
                # Not from np.random: if the mapper re-seeds it, the same image would be drawn
                # forever.
                rng = np.random.default_rng([self.seed, place, len(refused)])
                index = int(rng.integers(len(self.dataset)))
        raise RuntimeError(
            f"The mapper returned None for {MAX_TRIES} images in a row: {refused[:5]}, ..."
        )

    def __len__(self) -> int:
        return len(self.dataset)


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Seed `random`, `np.random` and torch's CPU generator; restore their states on leaving."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    a, b, c = np.random.SeedSequence(seed).generate_state(3)
    random.seed(int(a))
    np.random.seed(int(b))
    # Not torch.manual_seed, which would also seed the GPUs' generators.
    torch.default_generator.manual_seed(int(c))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
