from functools import partial
from typing import Callable, ContextManager

import torch


def autocast_now(device_type: str) -> Callable[[], ContextManager]:
    """
    Returns:
        what enters mixed precision as it is here and now, on or off, wherever it is called
    """
    if hasattr(torch, "get_autocast_dtype"):
        enabled = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type)
    elif device_type == "cuda":
        enabled, dtype = torch.is_autocast_enabled(), torch.get_autocast_gpu_dtype()
    else:
        enabled, dtype = torch.is_autocast_cpu_enabled(), torch.get_autocast_cpu_dtype()
    return partial(torch.autocast, device_type, enabled=enabled, dtype=dtype)
