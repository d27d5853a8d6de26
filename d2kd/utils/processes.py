"""What the processes of a run, one per GPU, have to agree on."""

import torch
from torch import Tensor

from detectron2.utils import comm


def mean_over_processes(x: Tensor) -> Tensor:
    """
    The mean of every process's x, without gradient. Every process must ask.

    DistributedDataParallel averages gradients over processes. A loss that each of them divided by a
    count of its own would let an object count more in the processes that have few.
    """
    x, processes = x.detach().float(), comm.get_world_size()
    if processes == 1:
        return x
    x = x / processes
    torch.distributed.all_reduce(x)
    return x
