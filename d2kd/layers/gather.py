from typing import List

import torch
from torch import Tensor

from detectron2.utils import comm


def gather_rows(x: Tensor, counts: List[int]) -> Tensor:
    """
    The rows of all processes, in the order of their ranks.

    all_gather wants equal sizes, so each process pads to the largest count and the padding is cut
    off again. Gradients flow to this process's own rows only.

    Args:
        x: (R, D), R may differ between processes and be 0
        counts: R of each process

    Returns:
        (sum of counts, D)
    """
    if len(counts) == 1:
        return x
    rank = comm.get_rank()
    assert len(x) == counts[rank], f"{len(x)} rows, but counts are {counts} and this is rank {rank}"
    padded = x.new_zeros(max(counts), x.shape[1])
    padded[: len(x)] = x.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(gathered, padded)
    rows = [other[:count] for other, count in zip(gathered, counts)]
    rows[rank] = x
    return torch.cat(rows)
