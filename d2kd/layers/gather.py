import torch
from torch import Tensor

from detectron2.utils import comm


def gather_rows(x: Tensor, counts: Tensor) -> Tensor:
    """
    The rows of all processes, in the order of their ranks, without gradient.

    all_gather wants equal sizes, so each process pads to the largest count and the padding is cut
    off again.

    Args:
        x: (R, D), R may differ between processes and be 0
        counts: (processes,), R of each

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
