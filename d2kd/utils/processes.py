"""Means and concatenations over the processes of a run, one per GPU."""

import torch
from torch import Tensor

from detectron2.utils import comm


def mean_over_processes(x: Tensor) -> Tensor:
    """
    The mean of x over all processes, without gradient. All processes must call it.

    DistributedDataParallel averages gradients over processes. If each divided its loss by its own
    count, objects would weigh more in processes that have few.
    """
    x, processes = x.detach().float(), comm.get_world_size()
    if processes == 1:
        return x
    x = x / processes
    torch.distributed.all_reduce(x)
    return x


def gather_rows(x: Tensor, counts: Tensor) -> Tensor:
    """
    Concatenate the rows of all processes, in the order of ranks, without gradient.

    all_gather needs equal sizes, so each process pads to the largest count; the padding is removed
    afterwards.

    Args:
        x: (R, D), R may differ between processes and be 0
        counts: (processes,), R of each process

    Returns:
        (sum of counts, D)
    """
    x, sizes, rank = x.detach(), counts.tolist(), comm.get_rank()
    assert len(x) == sizes[rank], f"{len(x)} rows, but counts are {sizes} and this is rank {rank}"
    if len(sizes) == 1 or max(sizes) == 0:
        return x
    padded = x.new_zeros(max(sizes), x.shape[1])
    padded[: len(x)] = x
    gathered = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(gathered, padded)
    return torch.cat([rows[:size] for rows, size in zip(gathered, sizes)])
