from typing import TypeVar

import torch

# A tensor, or what Detectron2 has a `to` of the same arguments for.
Movable = TypeVar("Movable")


def to_device(x: Movable, device: torch.device) -> Movable:
    """
    A copy towards a GPU is not waited for, so the loader pins what it gives. One towards the CPU
    is: what comes from a GPU must have arrived before the host reads it.
    """
    return x.to(device, non_blocking=device.type != "cpu")
